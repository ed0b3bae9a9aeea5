/* Layers with quantized weights on the CPU: weights unpacked, and products of rows with a weight that stays packed.

   No OpenMP here: `run` is handed the parallel region of the runtime that torch has loaded, so that there is one pool of
   threads; without one it works alone. Threads take `step` rows of the weight off a counter until none is left. */

#include "_weight_only.h"

enum { MAX_M = 16, NR = 4 };                         /* few rows: of x; of W at a time */
enum { XR = 3, WR = 8, DEPTH = CHUNK, BLOCK = 256 }; /* many: rows of x and W in registers, columns and rows in a cache */

int bf16_rows(void) { return FAST; }
int64_t job_size(void) { return (int64_t)sizeof(Job); }
int max_rows(void) { return MAX_M; }

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

static void store(const Job *w, int64_t row, int64_t r0, int64_t count, const float *sums) {
  for (int64_t j = 0; j < count; j++) {
    float y = sums[j] + (w->bias ? w->bias[r0 + j] : 0);
    int64_t at = row * w->out_stride + r0 + j;
    if (w->out_type == F32) ((float *)w->out)[at] = y;
    else ((uint16_t *)w->out)[at] = to_bf16(y);
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

/* --------------------------------------------------------------------------------------------------- many rows */
#if FAST
/* y[i * ldy + j] += x[i] . w[j] over n columns: m <= XR rows of x, WR of w, which are DEPTH values apart. */
static INLINE void tile(const uint16_t *x, int64_t ldx, int m, const uint16_t *w, int64_t n, float *y, int64_t ldy) {
  __m512 sum[XR][WR];
  __m512bh v[XR], u;
  int64_t k = 0;
  int i, j;
  for (i = 0; i < m; i++) for (j = 0; j < WR; j++) sum[i][j] = _mm512_setzero_ps();
  for (; k + 32 <= n; k += 32) {
    for (i = 0; i < m; i++) v[i] = (__m512bh)_mm512_loadu_si512(x + i * ldx + k);
    for (j = 0; j < WR; j++) {
      u = (__m512bh)_mm512_load_si512(w + j * DEPTH + k);
      for (i = 0; i < m; i++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], v[i], u);
    }
  }
  if (k < n) { /* w ends with zeros, x ends where it ends */
    __mmask32 some = ((__mmask32)1 << (n - k)) - 1;
    for (i = 0; i < m; i++) v[i] = (__m512bh)_mm512_maskz_loadu_epi16(some, x + i * ldx + k);
    for (j = 0; j < WR; j++) {
      u = (__m512bh)_mm512_load_si512(w + j * DEPTH + k);
      for (i = 0; i < m; i++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], v[i], u);
    }
  }
  for (i = 0; i < m; i++) { /* the lanes of eight sums become eight numbers */
    __m256 h[WR];
    for (j = 0; j < WR; j++)
      h[j] = _mm256_add_ps(_mm512_castps512_ps256(sum[i][j]), _mm512_extractf32x8_ps(sum[i][j], 1));
    for (j = 0; j < 4; j++) h[j] = _mm256_hadd_ps(h[2 * j], h[2 * j + 1]);
    for (j = 0; j < 2; j++) h[j] = _mm256_hadd_ps(h[2 * j], h[2 * j + 1]);
    h[0] = _mm256_add_ps(_mm256_permute2f128_ps(h[0], h[1], 0x20), _mm256_permute2f128_ps(h[0], h[1], 0x31));
    _mm256_storeu_ps(y + i * ldy, _mm256_add_ps(_mm256_loadu_ps(y + i * ldy), h[0]));
  }
}

/* Columns [k, k + n) of rows [r, r + WR) of the weight into `values`, with zeros behind and below it. The same columns of
   the rows that follow are fetched meanwhile: too far apart for the processor to guess. */
static void panel(const Job *w, int64_t r, int64_t count, const float *const *scale, const float *const *zero, int64_t k,
                  int64_t n, uint16_t *values) {
  int64_t begin = k * w->bits / 8, bytes = n * w->bits / 8, whole = n & ~(int64_t)31;
  for (int64_t j = 0; j < WR; j++) {
    uint16_t *row = values + j * DEPTH;
    if (j >= count) { memset(row, 0, 2 * DEPTH); continue; }
    if (whole < n) memset(row + whole, 0, 64);
    unpack(w, r + j, scale[j], zero[j], k, n, BF16, row);
    if (r + j + WR < w->rows)
      for (int64_t b = 0; b < bytes; b += 64) _mm_prefetch(w->codes + (r + j + WR) * w->row_bytes + begin + b, _MM_HINT_T1);
  }
}

/* Rows [r0, r0 + count) of the weight, which are written once for BLOCK rows of x into a buffer in the first cache. `y`
   holds BLOCK rows of sums. */
static void many_rows(const Job *w, int64_t r0, int64_t count, const float *const *scale, const float *const *zero,
                      float *y) {
  uint16_t values[WR * DEPTH] __attribute__((aligned(64)));
  int64_t ldy = (count + WR - 1) / WR * WR;
  for (int64_t first = 0; first < w->m; first += BLOCK) {
    int64_t m = w->m - first < BLOCK ? w->m - first : BLOCK;
    memset(y, 0, sizeof(float) * (size_t)(m * ldy));
    for (int64_t k = 0; k < w->cols; k += DEPTH) {
      int64_t n = w->cols - k < DEPTH ? w->cols - k : DEPTH;
      const uint16_t *x = (const uint16_t *)w->x + first * w->cols + k;
      for (int64_t r = 0; r < count; r += WR) {
        panel(w, r0 + r, count - r, scale + r, zero + r, k, n, values);
        for (int64_t i = 0; i < m; i += XR) {
          const uint16_t *from = x + i * w->cols;
          float *to = y + i * ldy + r;
          switch (m - i) {
            case 1: tile(from, w->cols, 1, values, n, to, ldy); break;
            case 2: tile(from, w->cols, 2, values, n, to, ldy); break;
            default: tile(from, w->cols, XR, values, n, to, ldy);
          }
        }
      }
    }
    for (int64_t i = 0; i < m; i++) store(w, first + i, r0, count, y + i * ldy);
  }
}
#endif

/* ---------------------------------------------------------------------------------------------------- threads */
/* Scales and zero points of rows [begin, end) as float32, in `memory` once for each row of blocks. */
static void all_params(const Job *w, int64_t begin, int64_t end, float *memory, const float **scale, const float **zero) {
  for (int64_t r = begin; r < end; r++, scale++, zero++) {
    int64_t cols = w->param_cols, b = r / w->block_rows;
    float *p = memory + 2 * (r - begin) * cols;
    if (r > begin && r % w->block_rows) { *scale = scale[-1]; *zero = zero[-1]; continue; }
    params(w->scale, w->scale_type, b * cols, cols, p);
    params(w->zero, w->zero_type, b * cols, cols, p + cols);
    *scale = p;
    *zero = p + cols;
  }
}

static void work(void *data) {
  Job *w = data;
  static const int SIZE[] = {0, 4, 2, 2};
  int many = w->x && w->m > MAX_M;
  int64_t begin, r, step = w->step, sums = many ? BLOCK * ((step + WR - 1) / WR * WR) : 0;
  float *memory = malloc(sizeof(float) * (size_t)(2 * step * w->param_cols + sums));
  const float **scale = malloc(sizeof(float *) * 2 * (size_t)step), **zero = scale + step;
  if (!memory || !scale) w->failed = 1;
  while (!w->failed && (begin = __atomic_fetch_add(&w->next, step, __ATOMIC_RELAXED)) < w->rows) {
    int64_t end = begin + step < w->rows ? begin + step : w->rows;
    all_params(w, begin, end, memory, scale, zero);
#if FAST
    if (many) { many_rows(w, begin, end - begin, scale, zero, memory + 2 * step * w->param_cols); continue; }
#endif
    if (w->x)
      for (r = begin; r < end; r += NR)
        few_rows(w, r, end - r < NR ? (int)(end - r) : NR, scale + (r - begin), zero + (r - begin));
    else
      for (r = begin; r < end; r++)
        for (int64_t k = 0; k < w->cols; k += CHUNK)
          unpack(w, r, scale[r - begin], zero[r - begin], k, w->cols - k < CHUNK ? w->cols - k : CHUNK, w->out_type,
                 (char *)w->out + (r * w->out_stride + k) * SIZE[w->out_type]);
  }
  free(memory);
  free(scale);
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* 0, or 1 if there was no memory. */
int run(Job *w, Parallel *parallel, unsigned threads) {
  w->next = w->failed = 0;
  if (parallel && threads > 1 && w->rows > w->step) parallel(work, w, threads, 0);
  else work(w);
  return (int)w->failed;
}
