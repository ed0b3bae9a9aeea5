/* Layers with quantized weights on the CPU: codes to real values, and the product of few rows with such a weight.

   Weights are read as they are stored: a row is a stream of `bits` a code, low bits first, rows start on a byte.
   value = (code value - zero point) * scale in float32, then rounded once to the type of the result.

   No OpenMP here: `run` is handed the parallel region of the runtime that torch has loaded, so that there is one pool of
   threads; without one it works alone. Threads take chunks of rows off a counter until none is left. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define FAST 1
#else
#define FAST 0
#endif

#define INLINE inline __attribute__((always_inline))

enum { NONE, F32, F16, BF16, I8, U8, I32 }; /* types of scales, zero points and results */
enum { TABLE, UNSIGNED, SIGNED };           /* what a code means: an entry of `table`, or an integer */
enum { MAX_M = 64, CHUNK = 1024, NR = 4 };  /* rows of x; columns unpacked at a time, a multiple of 32; rows of W */

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

int bf16_rows(void) { return FAST; }
int64_t job_size(void) { return (int64_t)sizeof(Job); }
int max_rows(void) { return MAX_M; }

/* ------------------------------------------------------------------------------------------------------- numbers */
static inline float from_bits(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
static inline uint32_t to_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }

static inline float half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  float f = rest < 0x7c00 ? from_bits(rest << 13) * 0x1p112f : from_bits(rest << 13 | 0x7f800000);
  return from_bits(to_bits(f) | sign);
}

static inline uint16_t bf16(float f) {
  uint32_t b = to_bits(f), up = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return f != f ? 0x7fc0 : (uint16_t)up;
}

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
      for (i = 0; i < part; i++) o[i] = bf16(values[i]);
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

/* --------------------------------------------------------------------------------------------------- few rows */
/* acc[i][j] += x[i] . w[j] over n columns, as vectors of partial sums. */
#if defined(__AVX512F__)
enum { LANES = 16, MR = 4 };
#elif defined(__AVX__)
enum { LANES = 8, MR = 2 };
#else
enum { LANES = 4, MR = 2 };
#endif
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static INLINE void dot_f32(const float *x, int64_t ldx, int m, const float *w, int64_t n,
                                                          Vec *acc) {
  Vec sum[MR][NR];
  int64_t k;
  int i, j;
  for (i = 0; i < m; i++) for (j = 0; j < NR; j++) sum[i][j] = acc[i * NR + j];
  for (k = 0; k + LANES <= n; k += LANES)
    for (i = 0; i < m; i++) {
      Vec v = *(const Vec *)(x + i * ldx + k);
      for (j = 0; j < NR; j++) sum[i][j] += v * *(const Vec *)(w + j * CHUNK + k);
    }
  for (i = 0; i < m; i++) for (j = 0; j < NR; j++) acc[i * NR + j] = sum[i][j];
  for (; k < n; k++)
    for (i = 0; i < m; i++) for (j = 0; j < NR; j++) acc[i * NR + j][0] += x[i * ldx + k] * w[j * CHUNK + k];
}

#if FAST
static INLINE void dot_bf16(const uint16_t *x, int64_t ldx, int m, const uint16_t *w,
                                                           int64_t n, Vec *acc) {
  __m512 sum[MR][NR];
  __m512i weight[NR];
  int64_t k;
  int i, j;
  for (i = 0; i < m; i++) for (j = 0; j < NR; j++) sum[i][j] = (__m512)acc[i * NR + j];
  for (k = 0; k < n; k += 32) { /* the weight's buffer ends with zeros, x ends where it ends */
    __mmask32 some = n - k >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (n - k)) - 1;
    for (j = 0; j < NR; j++) weight[j] = _mm512_maskz_loadu_epi16(some, w + j * CHUNK + k);
    for (i = 0; i < m; i++) {
      __m512i v = _mm512_maskz_loadu_epi16(some, x + i * ldx + k);
      for (j = 0; j < NR; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)v, (__m512bh)weight[j]);
    }
  }
  for (i = 0; i < m; i++) for (j = 0; j < NR; j++) acc[i * NR + j] = (Vec)sum[i][j];
}
#endif

#if FAST
/* m <= MR rows of x and NR of W: values go from the codes into the product without a buffer. n is a multiple of 32. The
   same columns of the next NR rows are fetched meanwhile: too far apart for the processor to guess. */
static INLINE void direct(const Job *w, const uint16_t *x, const uint8_t *const *row, int bits, int kind, int m,
                          const float *const *scale, const float *const *zero, int64_t n, Vec *acc) {
  const __m512 values = _mm512_loadu_ps(w->table);
  __m512 sum[MR][NR];
  __m512i low[NR], weight[NR];
  int64_t k = 0, b, next = NR * w->row_bytes;
  int i, j;
  for (i = 0; i < m; i++) for (j = 0; j < NR; j++) sum[i][j] = _mm512_setzero_ps();
  for (b = 0; k < n; b++) {
    int64_t end = n - k < w->block_cols ? n : k + w->block_cols;
    if (bits < 8)
      for (j = 0; j < NR; j++) {
        __m512 t = _mm512_mul_ps(_mm512_sub_ps(values, _mm512_set1_ps(zero[j][b])), _mm512_set1_ps(scale[j][b]));
        low[j] = (__m512i)_mm512_cvtne2ps_pbh(t, t);
      }
    for (; k < end; k += 32) {
      if (k * bits / 8 % 64 < 4 * bits) for (j = 0; j < NR; j++) _mm_prefetch(row[j] + next + k * bits / 8, _MM_HINT_T0);
      for (j = 0; j < NR; j++) {
        const uint8_t *p = row[j] + k * bits / 8;
        if (bits == 8) {
          uint16_t some[32];
          convert(p, kind, _mm512_set1_ps(scale[j][b]), _mm512_set1_ps(zero[j][b]), 32, BF16, some);
          weight[j] = _mm512_loadu_si512(some);
        } else if (bits == 4) {
          __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
          weight[j] = _mm512_permutexvar_epi16(_mm512_or_si512(c, _mm512_slli_epi32(c, 12)), low[j]);
        } else weight[j] = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(split32(p, bits)), low[j]);
      }
      for (i = 0; i < m; i++) {
        __m512bh v = (__m512bh)_mm512_loadu_si512(x + i * w->cols + k);
        for (j = 0; j < NR; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], v, (__m512bh)weight[j]);
      }
    }
  }
  for (i = 0; i < m; i++) for (j = 0; j < NR; j++) acc[i * NR + j] = (Vec)sum[i][j];
}

/* How many columns have been done so: 0 where the weight is not made for it. */
static int64_t direct_columns(const Job *w, int64_t r0, int count, const float *const *scale, const float *const *zero,
                              Vec *acc) {
  int64_t n = w->cols & ~(int64_t)31;
  const uint8_t *row[NR];
  int known = w->bits <= 4 || (w->bits == 8 && w->kind != TABLE);
  if (w->x_type != BF16 || count < NR || w->m > (w->bits == 8 ? 2 : 4) * MR || w->block_cols % 32 || !known) return 0;
  for (int j = 0; j < NR; j++) row[j] = w->codes + (r0 + j) * w->row_bytes;
  for (int64_t i = 0; i < w->m; i += MR, acc += MR * NR) {
    const uint16_t *x = (const uint16_t *)w->x + i * w->cols;
    int64_t part = w->m - i < MR ? w->m - i : MR;
    switch (8 * part + (w->bits == 8 ? w->kind - UNSIGNED + 5 : w->bits)) {
#define ROWS(m, at, bits, kind) case 8 * m + at: direct(w, x, row, bits, kind, m, scale, zero, n, acc); break;
#define CASE(at, bits, kind) \
    ROWS(1, at, bits, kind) ROWS(2, at, bits, kind) ROWS(3, at, bits, kind) ROWS(4, at, bits, kind)
      CASE(1, 1, TABLE) CASE(2, 2, TABLE) CASE(3, 3, TABLE) CASE(4, 4, TABLE) CASE(5, 8, UNSIGNED) CASE(6, 8, SIGNED)
#undef CASE
#undef ROWS
    }
  }
  return n;
}
#endif

static void dot(int type, const void *x, int64_t ldx, int m, const void *w, int64_t n, Vec *acc) {
  (void)type;
#if FAST
  if (type == BF16) {
    switch (m) {
      case 1: dot_bf16(x, ldx, 1, w, n, acc); return;
      case 2: dot_bf16(x, ldx, 2, w, n, acc); return;
      case 3: dot_bf16(x, ldx, 3, w, n, acc); return;
      default: dot_bf16(x, ldx, 4, w, n, acc); return;
    }
  }
#endif
  switch (m) {
    case 1: dot_f32(x, ldx, 1, w, n, acc); return;
    case 2: dot_f32(x, ldx, 2, w, n, acc); return;
#if defined(__AVX512F__)
    case 3: dot_f32(x, ldx, 3, w, n, acc); return;
    default: dot_f32(x, ldx, 4, w, n, acc); return;
#endif
  }
}

static void store(const Job *w, int64_t row, int64_t r0, int count, const float *sums) {
  for (int j = 0; j < count; j++) {
    float y = sums[j] + (w->bias ? w->bias[r0 + j] : 0);
    int64_t at = row * w->out_stride + r0 + j;
    if (w->out_type == F32) ((float *)w->out)[at] = y;
    else ((uint16_t *)w->out)[at] = bf16(y);
  }
}

/* Rows [r0, r0 + count) of the weight, count <= NR. */
static void few_rows(const Job *w, int64_t r0, int count, const float *const *scale, const float *const *zero) {
  static const int SIZE[] = {0, 4, 2, 2};
  float buffer[NR * CHUNK] __attribute__((aligned(64)));
  Vec acc[(MAX_M / MR + 1) * MR * NR];
  int size = SIZE[w->x_type];
  int64_t m = w->m, k = 0, i;
  int j, l;
  memset(acc, 0, sizeof(Vec) * (size_t)(m * NR));
  if (count < NR) memset(buffer, 0, sizeof buffer);
#if FAST
  k = direct_columns(w, r0, count, scale, zero, acc);
#endif
  for (; k < w->cols; k += CHUNK) {
    int64_t n = w->cols - k < CHUNK ? w->cols - k : CHUNK;
    for (j = 0; j < count; j++)
      unpack(w, r0 + j, scale[j], zero[j], k, n, w->x_type, (char *)buffer + j * CHUNK * size);
    for (i = 0; i < m; i += MR) {
      int part = m - i < MR ? (int)(m - i) : MR;
      dot(w->x_type, (const char *)w->x + (i * w->cols + k) * size, w->cols, part, buffer, n, acc + i * NR);
    }
  }
  for (i = 0; i < m; i++) {
    float sums[NR] = {0};
    for (j = 0; j < NR; j++) {
#if FAST
      sums[j] = _mm512_reduce_add_ps((__m512)acc[i * NR + j]);
      continue;
#endif
      float lanes[LANES], sum;
      memcpy(lanes, &acc[i * NR + j], sizeof lanes);
      for (l = LANES / 2; l > 0; l /= 2) for (int h = 0; h < l; h++) lanes[h] += lanes[h + l];
      sum = lanes[0];
      sums[j] = sum;
    }
    store(w, i, r0, count, sums);
  }
}

/* ---------------------------------------------------------------------------------------------------- threads */
static void work(void *data) {
  Job *w = data;
  static const int SIZE[] = {0, 4, 2, 2};
  int64_t cols = w->param_cols, begin, r;
  float *memory = malloc(sizeof(float) * 2 * NR * (size_t)cols);
  if (!memory) { w->failed = 1; return; }
  while ((begin = __atomic_fetch_add(&w->next, w->step, __ATOMIC_RELAXED)) < w->rows) {
    int64_t end = begin + w->step < w->rows ? begin + w->step : w->rows;
    for (r = begin; r < end; r += NR) {
      int count = end - r < NR ? (int)(end - r) : NR;
      const float *scale[NR], *zero[NR];
      for (int j = 0; j < count; j++) {
        int64_t b = (r + j) / w->block_rows;
        float *p = memory + 2 * j * cols;
        if (j > 0 && (r + j) % w->block_rows) { scale[j] = scale[j - 1]; zero[j] = zero[j - 1]; continue; }
        params(w->scale, w->scale_type, b * cols, cols, p);
        params(w->zero, w->zero_type, b * cols, cols, p + cols);
        scale[j] = p;
        zero[j] = p + cols;
      }
      if (w->x) { few_rows(w, r, count, scale, zero); continue; }
      for (int j = 0; j < count; j++)
        for (int64_t k = 0; k < w->cols; k += CHUNK)
          unpack(w, r + j, scale[j], zero[j], k, w->cols - k < CHUNK ? w->cols - k : CHUNK, w->out_type,
                 (char *)w->out + ((r + j) * w->out_stride + k) * SIZE[w->out_type]);
    }
  }
  free(memory);
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* 0, or 1 if there was no memory. */
int run(Job *w, Parallel *parallel, unsigned threads) {
  w->next = w->failed = 0;
  if (parallel && threads > 1 && w->rows > w->step) parallel(work, w, threads, 0);
  else work(w);
  return (int)w->failed;
}
