/* float16 and bfloat16 as bits, and what they are as float32. */
#ifndef INC_NUMBERS_H
#define INC_NUMBERS_H
#include <stdint.h>
#include <string.h>

static inline float from_bits(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
static inline uint32_t to_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }

static inline float half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  float f = rest < 0x7c00 ? from_bits(rest << 13) * 0x1p112f : from_bits(rest << 13 | 0x7f800000);
  return from_bits(to_bits(f) | sign);
}

static inline uint16_t to_bf16(float f) {
  uint32_t b = to_bits(f);
  return f != f ? 0x7fc0 : (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
#endif
