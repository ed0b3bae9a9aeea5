/* Dynamic quantization on the CPU: the codes of activations with their own range, and the end of a layer on such codes.

   quantize   x [rows, cols] -> codes uint8 and, for each row or for all of them, a scale and a zero point, in one pass
              (two for one scale of all rows). Bit for bit what inc_graph.numerics computes; a signed format's codes and
              zero points are stored 128 higher.
   finish     sums [rows, cols] of codes times weights, already times the weight's scale s_w:
              y = scale * (sums - zero * s_w * sum of the weight's codes) + bias (+ other), then an activation function;
              written, or quantized by row at once and never written.

   Threads are those of the runtime that torch has loaded (see _weight_only.c); they take rows off a counter. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_numbers.h"
#include "_vectors.h"
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define FAST 1
#else
#define FAST 0
#endif

enum { NONE, F32, F16, BF16 };
enum { QUANTIZE, RANGES, APPLY, FINISH };                /* what a call does with its rows */
enum { LINEAR, RELU, GELU, GELU_TANH, SILU };            /* activation functions */

typedef struct {
  const void *x;            /* input, or sums */
  uint8_t *codes;           /* NULL: nothing is quantized */
  float *scale, *zero;      /* of the codes that are written */
  int64_t rows, cols, stride, step, next, failed;
  int32_t type, symmetric, qmin, qmax, offset, stage;
  float largest;            /* finite value of the input's type: what infinity counts as */
  int32_t activation;
  const float *x_scale, *x_zero, *sums, *bias; /* finish; x_zero may be NULL */
  const void *other;
  void *out;                /* may be the sums themselves, NULL if codes are written */
  int64_t x_step;           /* 0: one scale for all rows */
  int32_t out_type, unused;
} Job;

int64_t job_size(void) { return (int64_t)sizeof(Job); }

/* ------------------------------------------------------------------------------------------------------- numbers */
static inline uint16_t to_half(float f) {
  uint32_t b = to_bits(f), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (rest < 0x38800000) return (uint16_t)(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000)); /* subnormal */
  rest += 0xfff + (rest >> 13 & 1);
  return (uint16_t)(sign | ((rest - 0x38000000) >> 13));
}

/* A row as float32: itself, or widened into `buffer`. */
static const float *widened(const void *row, int type, int64_t n, float *buffer) {
  const uint16_t *h = row;
  int64_t i = 0;
  if (type == F32) return row;
  if (type == BF16) { for (; i < n; i++) buffer[i] = from_bits((uint32_t)h[i] << 16); return buffer; }
#if FAST
  for (; i + L <= n; i += L) _mm512_storeu_ps(buffer + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(h + i))));
#endif
  for (; i < n; i++) buffer[i] = half(h[i]);
  return buffer;
}

static void narrowed(const float *row, int type, int64_t n, uint16_t *out) {
  int64_t i = 0;
  if (type == BF16) { for (; i < n; i++) out[i] = to_bf16(row[i]); return; }
#if FAST
  for (; i + L <= n; i += L) _mm256_storeu_si256((void *)(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(row + i), 0));
#endif
  for (; i < n; i++) out[i] = to_half(row[i]);
}

/* ------------------------------------------------------------------------------------------------------ quantize */
/* Least and largest value of a row, zero among them. NaN and infinities make the least one NaN. */
static void range(const float *x, int64_t n, float *least, float *most) {
  float low = 0, high = 0, none = 0; /* the sum of 0 x: NaN if one of them is no finite number */
  int64_t i = 0;
#if FAST
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a, e = a, f = a, zero = a;
  for (; i + 2 * L <= n; i += 2 * L) { /* min(x, a) is a where x is NaN */
    __m512 u = _mm512_loadu_ps(x + i), v = _mm512_loadu_ps(x + i + L);
    a = _mm512_min_ps(u, a); b = _mm512_max_ps(u, b);
    c = _mm512_min_ps(v, c); d = _mm512_max_ps(v, d);
    e = _mm512_fmadd_ps(u, zero, e); f = _mm512_fmadd_ps(v, zero, f);
  }
  low = _mm512_reduce_min_ps(_mm512_min_ps(a, c));
  high = _mm512_reduce_max_ps(_mm512_max_ps(b, d));
  none = _mm512_reduce_add_ps(_mm512_add_ps(e, f));
#endif
  for (; i < n; i++) { low = x[i] < low ? x[i] : low; high = x[i] > high ? x[i] : high; none += x[i] * 0; }
  *least = none == 0 ? low : none;
  *most = high;
}

static void parameters(const Job *w, float low, float high, float largest, float *scale, float *zero) {
  const float bound = 0x1.fffffep126f; /* half of the largest float32 */
  float most = largest < bound ? largest : bound, steps = (float)(w->qmax - w->qmin), size, s;
  int bad = low != low; /* no range: a scale of NaN, and the zero point of zeros */
  if (bad) low = high = 0;
  low = low < -most ? -most : low;
  high = high > most ? most : high;
  size = -low > high ? -low : high;
  s = w->symmetric ? size / (steps / 2) : (high - low) / steps;
  s = size == 0 ? 1 : s < 0x1p-120f ? 0x1p-120f : s;
  *scale = bad ? NAN : s;
  if (w->symmetric) *zero = (float)((w->qmin + w->qmax + 1) / 2 + w->offset);
  else {
    float z = (float)w->qmin - rintf(low / s);
    z = z < (float)w->qmin ? (float)w->qmin : z > (float)w->qmax ? (float)w->qmax : z;
    *zero = z + (float)w->offset;
  }
}

static void apply(const Job *w, const float *x, int64_t n, float scale, float zero, uint8_t *codes) {
  float inverse = 1 / scale, low = (float)(w->qmin + w->offset), high = (float)(w->qmax + w->offset);
  int64_t i = 0;
#if FAST
  __m512 s = _mm512_set1_ps(inverse), z = _mm512_set1_ps(zero), a = _mm512_set1_ps(low), b = _mm512_set1_ps(high);
  for (; i < n; i += L) {
    __mmask16 m = n - i < L ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)0xffff;
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), s);
    __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    v = _mm512_maskz_roundscale_ps(number, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    v = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(v, z), a), b);
    _mm512_mask_cvtepi32_storeu_epi8(codes + i, m, _mm512_cvtps_epi32(v));
  }
#endif
  for (; i < n; i++) {
    float v = x[i] * inverse;
    v = v == v ? rintf(v) + zero : zero;
    codes[i] = (uint8_t)(v < low ? low : v > high ? high : v);
  }
}

static void quantize_row(const Job *w, const float *x, int64_t row, float largest) {
  float low, high;
  range(x, w->cols, &low, &high);
  parameters(w, low, high, largest, w->scale + row, w->zero + row);
  apply(w, x, w->cols, w->scale[row], w->zero[row], w->codes + row * w->cols);
}

/* -------------------------------------------------------------------------------------------------------- finish */
#if FAST
static inline V least(V a, V b) { return (V)_mm512_min_ps((__m512)b, (__m512)a); } /* a where either is NaN */
static inline V most(V a, V b) { return (V)_mm512_max_ps((__m512)b, (__m512)a); }
#else
static inline V least(V a, V b) { return pick((I)(b < a), b, a); }
static inline V most(V a, V b) { return pick((I)(b > a), b, a); }
#endif

/* e^x, and beyond what float32 holds its ends; NaN goes to NaN. */
static inline V exp_of(V x) { return pick((I)(x == x), exp_within(most(least(x, all(88)), all(-87))), x); }

/* erf, |error| < 5e-7: x p(x^2) / q(x^2), fitted to the least largest error on [0, 3.92]; beyond that it is 1. */
static inline V erf_of(V x) {
  V a = most(least(x, all(3.92f)), all(-3.92f)), u = a * a, p, q;
  p = all(1.9921497e-8f);
  p = p * u - 1.9943018e-6f;
  p = p * u + 1.4898641e-4f;
  p = p * u + 3.9728680e-3f;
  p = p * u + 5.1397186e-2f;
  p = p * u + .20611359f;
  p = p * u + 1.1283787f;
  q = all(1.0241189e-3f);
  q = q * u + 1.4889162e-2f;
  q = q * u + .11756429f;
  q = q * u + .51599216f;
  q = q * u + 1;
  return most(least(a * p / q, all(1)), all(-1));
}

static inline V activated(V y, int activation) {
  switch (activation) {
    case RELU: return pick((I)(y < 0), all(0), y);
    case GELU: return .5f * y * (1 + erf_of(y * .70710678f));
    case GELU_TANH: /* 0.5 (1 + tanh u) = 1 / (1 + e^-2u) */
      return y / (1 + exp_of(-1.59576912f * (y + .044715f * y * y * y)));
    case SILU: return y / (1 + exp_of(-y));
    default: return y;
  }
}

static inline V load(const float *p, int64_t n) {
  V v = {0};
  if (n >= L) return *(const V *)p;
  memcpy(&v, p, sizeof(float) * (size_t)n);
  return v;
}

static inline __attribute__((always_inline)) void finish_as(const Job *w, const float *sums, const float *other,
                                                            float scale, float zero, float *out, int activation) {
  for (int64_t i = 0; i < w->cols; i += L) {
    int64_t n = w->cols - i;
    V y = load(sums + i, n);
    if (w->x_zero) y -= zero * load(w->sums + i, n);
    y *= scale;
    if (w->bias) y += load(w->bias + i, n);
    if (other) y += load(other + i, n);
    y = activated(y, activation);
    if (n >= L) *(V *)(out + i) = y;
    else memcpy(out + i, &y, sizeof(float) * (size_t)n);
  }
}

static void finish_row(const Job *w, int64_t row, float *buffer) {
  static const int SIZE[] = {0, 4, 2, 2};
  const float *sums = (const float *)w->x + row * w->stride, *other = NULL;
  float scale = w->x_scale[row * w->x_step], zero = w->x_zero ? w->x_zero[row * w->x_step] : 0;
  char *to = w->out ? (char *)w->out + row * w->cols * SIZE[w->out_type] : NULL;
  float *y = to && w->out_type == F32 ? (float *)to : buffer;
  if (w->other)
    other = widened((const char *)w->other + row * w->cols * SIZE[w->out_type], w->out_type, w->cols, buffer + w->cols);
  switch (w->activation) { /* constants, so that each loop is compiled for its own */
    case RELU: finish_as(w, sums, other, scale, zero, y, RELU); break;
    case GELU: finish_as(w, sums, other, scale, zero, y, GELU); break;
    case GELU_TANH: finish_as(w, sums, other, scale, zero, y, GELU_TANH); break;
    case SILU: finish_as(w, sums, other, scale, zero, y, SILU); break;
    default: finish_as(w, sums, other, scale, zero, y, LINEAR);
  }
  if (w->codes) quantize_row(w, y, row, w->largest);
  else if (w->out_type != F32) narrowed(y, w->out_type, w->cols, (uint16_t *)to);
}

/* ------------------------------------------------------------------------------------------------------- threads */
static void work(void *data) {
  Job *w = data;
  static const int SIZE[] = {0, 4, 2, 2};
  int64_t begin, row;
  float *buffer = malloc(sizeof(float) * 2 * (size_t)(w->cols + L));
  if (!buffer) { w->failed = 1; return; }
  while ((begin = __atomic_fetch_add(&w->next, w->step, __ATOMIC_RELAXED)) < w->rows) {
    int64_t end = begin + w->step < w->rows ? begin + w->step : w->rows;
    for (row = begin; row < end; row++) {
      const void *from = (const char *)w->x + row * w->stride * SIZE[w->type];
      if (w->stage == FINISH) { finish_row(w, row, buffer); continue; }
      const float *x = widened(from, w->type, w->cols, buffer);
      if (w->stage == QUANTIZE) quantize_row(w, x, row, w->largest);
      else if (w->stage == RANGES) range(x, w->cols, w->scale + row, w->zero + row);
      else apply(w, x, w->cols, *w->scale, *w->zero, w->codes + row * w->cols);
    }
  }
  free(buffer);
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* One stage over all rows. After RANGES the range of all is in the first entries. 0, or 1 if there was no memory. */
int run(Job *w, Parallel *parallel, unsigned threads) {
  int64_t each = 16384 / (w->cols > 0 ? w->cols : 1); /* what is worth a thread's while */
  w->next = w->failed = 0;
  w->step = each < 1 ? 1 : each;
  if (parallel && threads > 1 && w->rows > w->step) parallel(work, w, threads, 0);
  else work(w);
  if (w->stage == RANGES && !w->failed) {
    float low = 0, high = 0;
    for (int64_t r = 0; r < w->rows; r++) {
      low = w->scale[r] < low || w->scale[r] != w->scale[r] ? w->scale[r] : low; /* NaN stays */
      high = w->zero[r] > high ? w->zero[r] : high;
    }
    parameters(w, low, high, w->largest, w->scale, w->zero);
  }
  return (int)w->failed;
}
