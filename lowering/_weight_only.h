/* Quantized weights on the CPU: codes to real values.

   Weights are read as they are stored: a row is a stream of `bits` a code, low bits first, rows start on a byte.
   value = (code value - zero point) * scale in float32, then rounded once to the type of the result. */

#ifndef INC_WEIGHT_ONLY_H
#define INC_WEIGHT_ONLY_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_numbers.h"
#if defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define FAST 1
#else
#define FAST 0
#endif

#define INLINE inline __attribute__((always_inline))

enum { NONE, F32, F16, BF16, I8, U8, I32 }; /* types of scales, zero points and results */
enum { TABLE, UNSIGNED, SIGNED };           /* what a code means: an entry of `table`, or an integer */
enum { CHUNK = 1024 };                      /* columns unpacked at a time, a multiple of 32 */

typedef struct {
  const uint8_t *codes;
  const void *scale, *zero;
  const float *table; /* value of each code, repeated up to 64 entries */
  int64_t rows, cols, row_bytes, block_rows, block_cols, param_cols;
  int32_t bits, kind, scale_type, zero_type;
  /* unpack: out [rows, cols] of out_type. linear: out [m, rows]; x [m, cols] of x_type (F32, or BF16 if bf16_rows()) */
  void *out;
  int32_t out_type, x_type;
  const void *x;
  const float *bias;
  int64_t m, step, out_stride, next, failed; /* threads take `step` rows at a time */
} Job;

/* ------------------------------------------------------------------------------------------------------- numbers */
/* Scales or zero points [begin, begin + count) as float32. */
static void params(const void *from, int type, int64_t begin, int64_t count, float *out) {
  int64_t i = 0;
  switch (type) {
    case F32: memcpy(out, (const float *)from + begin, 4 * (size_t)count); break;
    case F16:
#if FAST
      for (; count - i >= 16; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)from + begin + i))));
#endif
      for (; i < count; i++) out[i] = half(((const uint16_t *)from)[begin + i]);
      break;
    case BF16: for (i = 0; i < count; i++) out[i] = from_bits((uint32_t)((const uint16_t *)from)[begin + i] << 16); break;
    case I8: for (i = 0; i < count; i++) out[i] = ((const int8_t *)from)[begin + i]; break;
    case U8: for (i = 0; i < count; i++) out[i] = ((const uint8_t *)from)[begin + i]; break;
    case I32: for (i = 0; i < count; i++) out[i] = (float)((const int32_t *)from)[begin + i]; break;
    default: for (i = 0; i < count; i++) out[i] = 0;
  }
}

/* -------------------------------------------------------------------------------------------------- any machine */
/* Codes [k0, k0 + n) of a row, one a byte; k0 is a multiple of 8. */
static INLINE void split_by(const uint8_t *p, int bits, int64_t n, uint8_t *out) {
  int mask = (1 << bits) - 1, some = 8 / bits;
  int64_t i = 0;
  if (8 % bits == 0)
    for (; i + some <= n; i += some)
      for (int j = 0; j < some; j++) out[i + j] = p[i / some] >> bits * j & mask;
  else
    for (; i + 8 <= n; i += 8, p += bits) {
      uint64_t word = 0;
      for (int j = 0; j < bits; j++) word |= (uint64_t)p[j] << 8 * j;
      for (int j = 0; j < 8; j++) out[i + j] = (uint8_t)(word >> bits * j & (unsigned)mask);
    }
  p += 8 % bits == 0 ? i * bits / 8 : 0;
  for (int64_t at = 0; i < n; i++, at += bits) {
    int word = p[at / 8];
    if (at % 8 + bits > 8) word |= p[at / 8 + 1] << 8;
    out[i] = (uint8_t)(word >> at % 8 & mask);
  }
}

static void split(const uint8_t *row, int bits, int64_t k0, int64_t n, uint8_t *out) {
  const uint8_t *p = row + k0 * bits / 8;
  switch (bits) { /* constants, so that each loop is compiled for its own */
    case 1: split_by(p, 1, n, out); break;
    case 2: split_by(p, 2, n, out); break;
    case 3: split_by(p, 3, n, out); break;
    case 4: split_by(p, 4, n, out); break;
    case 5: split_by(p, 5, n, out); break;
    case 6: split_by(p, 6, n, out); break;
    default: memcpy(out, p, (size_t)n);
  }
}

/* Columns [k0, k0 + n) of a row; scale and zero are those of its row of blocks. */
static void portable(const Job *w, const uint8_t *row, const float *scale, const float *zero, int64_t k0, int64_t n,
                     int type, void *out) {
  uint8_t codes[CHUNK];
  float values[CHUNK];
  int64_t i, j;
  for (; n > 0; ) {
    int64_t part = n < CHUNK ? n : CHUNK;
    split(row, w->bits, k0, part, codes);
    if (w->kind == TABLE) for (i = 0; i < part; i++) values[i] = w->table[codes[i]];
    else if (w->kind == UNSIGNED) for (i = 0; i < part; i++) values[i] = codes[i];
    else {
      int up = 8 - w->bits;
      for (i = 0; i < part; i++) values[i] = (int8_t)(uint8_t)(codes[i] << up) >> up;
    }
    if (w->block_cols == 1) for (i = 0; i < part; i++) values[i] = (values[i] - zero[k0 + i]) * scale[k0 + i];
    else
      for (i = 0; i < part; i = j) {
        int64_t block = (k0 + i) / w->block_cols, end = (block + 1) * w->block_cols - k0;
        float s = scale[block], z = zero[block];
        end = end < part ? end : part;
        for (j = i; j < end; j++) values[j] = (values[j] - z) * s;
      }
    if (type == F32) { memcpy(out, values, 4 * (size_t)part); out = (float *)out + part; }
    else {
      uint16_t *o = out;
      for (i = 0; i < part; i++) o[i] = to_bf16(values[i]);
      out = o + part;
    }
    k0 += part;
    n -= part;
  }
}

/* --------------------------------------------------------------------------------------------------- AVX-512 */
#if FAST
/* The same for whole vectors of 32 columns of blocks that are made of such vectors. `bits` and `type` are constants
   wherever these functions are inlined. */
static const uint64_t SHIFTS[7] = {0, 0x0706050403020100, 0x0e0c0a0806040200, 0x15120f0c09060300, 0,
                                   0x231e19140f0a0500, 0x2a241e18120c0600};
#define SPREAD(b) {0,1,2,3,4,5,0,0, b,b+1,b+2,b+3,b+4,b+5,0,0, 2*b,2*b+1,2*b+2,2*b+3,2*b+4,2*b+5,0,0, \
                   3*b,3*b+1,3*b+2,3*b+3,3*b+4,3*b+5,0,0}
static const uint8_t ORDER[7][32] = {{0}, SPREAD(1), SPREAD(2), SPREAD(3), {0}, SPREAD(5), SPREAD(6)};

/* 32 codes as bytes; the bits above those of the code are not cleared. */
static INLINE __m256i split32(const uint8_t *p, int bits) {
  if (bits == 4) {
    __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    return _mm256_or_si256(w, _mm256_slli_epi16(w, 4));
  }
  __m256i bytes = _mm256_maskz_loadu_epi8((__mmask32)((1u << 4 * bits) - 1), p);
  bytes = _mm256_permutexvar_epi8(_mm256_loadu_si256((const __m256i *)ORDER[bits]), bytes);
  return _mm256_multishift_epi64_epi8(_mm256_set1_epi64x((long long)SHIFTS[bits]), bytes);
}

/* With a table a block, in which codes are looked up by their lowest bits: of few bits, it repeats. */
static INLINE void lookup(const uint8_t *p, int bits, const float *values, __m512 scale, __m512 zero, int64_t n,
                          int type, void *out) {
  __m512 t[4];
  int64_t i;
  for (i = 0; i < 4; i++)
    t[i] = i && bits <= 4 ? t[0] : i > 1 && bits == 5 ? t[i - 2]
         : _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(values + 16 * i), zero), scale);
  if (type == BF16) {
    __m512i low = (__m512i)_mm512_cvtne2ps_pbh(t[1], t[0]), high = (__m512i)_mm512_cvtne2ps_pbh(t[3], t[2]), index;
    for (i = 0; i < n; i += 32) {
      if (bits == 4) {
        __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p + i / 2)));
        index = _mm512_or_si512(w, _mm512_slli_epi32(w, 12));
      } else index = _mm512_cvtepu8_epi16(split32(p + i * bits / 8, bits));
      _mm512_storeu_si512((uint16_t *)out + i, bits == 6 ? _mm512_permutex2var_epi16(low, index, high)
                                                         : _mm512_permutexvar_epi16(index, low));
    }
    return;
  }
  for (i = 0; i < n; i += 32) {
    __m256i index = split32(p + i * bits / 8, bits);
    __m512i at[2] = {_mm512_cvtepu8_epi32(_mm256_castsi256_si128(index)),
                     _mm512_cvtepu8_epi32(_mm256_extracti128_si256(index, 1))};
    for (int h = 0; h < 2; h++) {
      __m512 v = bits <= 4 ? _mm512_permutexvar_ps(at[h], t[0]) : _mm512_permutex2var_ps(t[0], at[h], t[1]);
      if (bits == 6) {
        __mmask16 upper = _mm512_test_epi32_mask(at[h], _mm512_set1_epi32(32));
        v = _mm512_mask_mov_ps(v, upper, _mm512_permutex2var_ps(t[2], at[h], t[3]));
      }
      _mm512_storeu_ps((float *)out + i + 16 * h, v);
    }
  }
}

static INLINE void convert(const uint8_t *p, int kind, __m512 scale, __m512 zero, int64_t n, int type, void *out) {
  for (int64_t i = 0; i < n; i += 32) {
    __m512 v[2];
    for (int h = 0; h < 2; h++) {
      __m128i b = _mm_loadu_si128((const __m128i *)(p + i + 16 * h));
      v[h] = _mm512_cvtepi32_ps(kind == SIGNED ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
      v[h] = _mm512_mul_ps(_mm512_sub_ps(v[h], zero), scale);
      if (type == F32) _mm512_storeu_ps((float *)out + i + 16 * h, v[h]);
    }
    if (type == BF16) _mm512_storeu_si512((uint16_t *)out + i, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
  }
}

/* Columns [k0, k0 + n) of a row. */
static INLINE void blocks(const Job *w, const uint8_t *p, int bits, int kind, const float *scale, const float *zero,
                          int64_t k0, int64_t n, int type, void *out) {
  int64_t b = k0 / w->block_cols, room = (b + 1) * w->block_cols - k0;
  int size = type == BF16 ? 2 : 4;
  for (p += k0 * bits / 8; n > 0; b++, room = w->block_cols) {
    int64_t part = room < n ? room : n;
    __m512 s = _mm512_set1_ps(scale[b]), z = _mm512_set1_ps(zero[b]);
    if (bits == 8) convert(p, kind, s, z, part, type, out);
    else lookup(p, bits, w->table, s, z, part, type, out);
    p += part * bits / 8;
    n -= part;
    out = (char *)out + part * size;
  }
}

static void fast(const Job *w, const uint8_t *p, const float *scale, const float *zero, int64_t k0, int64_t n, int type,
                 void *out) {
  switch (w->bits + 8 * (type == BF16) + 64 * (w->bits == 8 && w->kind == SIGNED)) {
#define CASE(bits, kind) \
    case bits + 64 * (kind == SIGNED): blocks(w, p, bits, kind, scale, zero, k0, n, F32, out); break; \
    case bits + 8 + 64 * (kind == SIGNED): blocks(w, p, bits, kind, scale, zero, k0, n, BF16, out); break;
    CASE(1, TABLE) CASE(2, TABLE) CASE(3, TABLE) CASE(4, TABLE) CASE(5, TABLE) CASE(6, TABLE)
    CASE(8, UNSIGNED) CASE(8, SIGNED)
#undef CASE
  }
}
#endif

/* Columns [k0, k0 + n) of row r, k0 a multiple of 32. `scale` and `zero`: of the row of blocks that r is in. */
static void unpack(const Job *w, int64_t r, const float *scale, const float *zero, int64_t k0, int64_t n, int type,
                   void *out) {
  const uint8_t *row = w->codes + r * w->row_bytes;
#if FAST
  if ((w->bits < 8 || w->kind != TABLE) && w->block_cols % 32 == 0 && n >= 32) {
    int64_t whole = n & ~(int64_t)31;
    fast(w, row, scale, zero, k0, whole, type, out);
    k0 += whole;
    n -= whole;
    out = (char *)out + whole * (type == BF16 ? 2 : 4);
  }
#endif
  if (n > 0) portable(w, row, scale, zero, k0, n, type, out);
}
#endif
