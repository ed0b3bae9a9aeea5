/* Vectors of 16 floats by the compiler's own extensions: on a processor without such registers they are slow, and right. */
#ifndef INC_VECTORS_H
#define INC_VECTORS_H
#include <stdint.h>

enum { L = 16 };
typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(64), aligned(4), may_alias));

static inline V all(float x) { return (V){0} + x; }
static inline V pick(I mask, V a, V b) { return (V)((mask & (I)a) | (~mask & (I)b)); }

/* e^x for x from -87 to 88: Taylor on [-ln 2 / 2, ln 2 / 2], 2^n in the exponent; two units in the last place. */
static inline V exp_within(V x) {
  V n = x * 1.44269504f + 12582912.f, r, p;
  n -= 12582912.f;
  r = x - n * 0.693359375f + n * 2.12194440e-4f;
  p = all(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1;
  p = p * r + 1;
  return (V)((I)p + (__builtin_convertvector(n, I) << 23));
}
#endif
