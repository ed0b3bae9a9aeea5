/* The steps of an LSTM or GRU with int8 weights, all of them in one call.

   At each step, for every sequence that still has one:
     sums = codes @ state          codes int8 [gates * units, units] as they are stored, state in 16-bit integers
     LSTM: i f g o = sums + x;  c = s(f) c + s(i) tanh(g);  h = s(o) tanh(c)
     GRU:  r z n = sums + bias; r = s(r + x_r), z = s(z + x_z), n = tanh(x_n + r n);  h = n + z (h - n)

   The state is between -1 and 1 from the first step on (of a GRU: not above its first value), so that its scale is
   known before it is computed. 16 bits are as good as float32 beside weights of 8, and twice as fast. Sums are exact: the
   state takes as many bits as they leave. A row with NaN, or a first state that is not finite, gives NaN from there on.

   Threads are those of the runtime that torch has loaded (see _weight_only.c). A step is cut into a part for each; a
   thread takes the next part and waits until all parts of the step before are done, so any number of threads will do. */

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

#include "_vectors.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define FAST 1
#else
#define FAST 0
#endif

enum { ROWS = 4, PAD = 32 };

typedef struct {
  const float *x;           /* [rows, gates * units], of the packed sequences */
  const int8_t *codes;
  const float *scale, *bias; /* of the codes, [gates * units] or one; bias may be NULL */
  const int64_t *sizes, *offsets; /* rows of each step, and the first of them */
  const float *first;       /* h before the first step, [batch, units] */
  float *h, *c;             /* [batch, units]: overwritten; c NULL makes it a GRU */
  float *out;               /* [rows, units], of an LSTM [rows, 2 * units]: h and c */
  int16_t *state;           /* [2, batch, width]: before and after a step; width: units, up to a multiple of PAD */
  float *first_scale, *scales; /* of the state before and after the first step, [batch] */
  int64_t *bad;             /* [batch]: the step at which a row has become NaN */
  int64_t steps, batch, units, width, scale_step, reverse, parts, next, done;
} Job;

int64_t job_size(void) { return (int64_t)sizeof(Job); }

/* ------------------------------------------------------------------------------------------------------ functions */

/* e^x, |x| at most 87; NaN stays NaN. */
static inline V exp_of(V x) {
  V t = pick((I)(x > 87), all(87), pick((I)(x < -87), all(-87), x));
  return pick((I)(x == x), exp_within(t), x);
}

static inline V sigmoid(V x) { return 1 / (1 + exp_of(-x)); }
static inline V tanh_of(V x) { return 1 - 2 / (1 + exp_of(2 * x)); }

static inline V load(const float *p, int64_t n) {
  V v = {0};
  if (n >= L) return *(const V *)p;
  memcpy(&v, p, sizeof(float) * (size_t)n);
  return v;
}

static inline void store(float *p, V v, int64_t n) {
  if (n >= L) *(V *)p = v;
  else memcpy(p, &v, sizeof(float) * (size_t)n);
}

/* -------------------------------------------------------------------------------------------------------- products */
#if FAST
static inline __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
#define HALF(v) _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1))
  __m256i ab = _mm256_hadd_epi32(HALF(a), HALF(b)), cd = _mm256_hadd_epi32(HALF(c), HALF(d));
  __m256i s = _mm256_hadd_epi32(ab, cd);
#undef HALF
  return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}
#endif

/* One unit's rows of the codes, `apart` bytes from each other, times `rows` rows of the state: sums[row][gate]. */
static inline __attribute__((always_inline)) void products(const int8_t *codes, int64_t apart, const int16_t *state,
                                                           int64_t width, int64_t cols, int gates, int rows,
                                                           int32_t sums[ROWS][4]) {
#if FAST
  __m512i acc[ROWS][4];
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < 4; g++) acc[r][g] = _mm512_setzero_si512();
  for (int64_t k = 0; k < cols; k += PAD) {
    __mmask32 m = cols - k < PAD ? (1u << (cols - k)) - 1 : 0xffffffffu;
    __m512i w[4];
    for (int g = 0; g < gates; g++) w[g] = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(m, codes + g * apart + k));
    for (int r = 0; r < rows; r++) {
      __m512i s = _mm512_loadu_si512(state + r * width + k);
      for (int g = 0; g < gates; g++) acc[r][g] = _mm512_dpwssd_epi32(acc[r][g], w[g], s);
    }
  }
  for (int r = 0; r < rows; r++)
    _mm_storeu_si128((__m128i *)sums[r], sums_of(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
#else
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < gates; g++) {
      int32_t sum = 0;
      for (int64_t k = 0; k < cols; k++) sum += (int32_t)codes[g * apart + k] * state[r * width + k];
      sums[r][g] = sum;
    }
#endif
}

static void products_of(const Job *w, const int8_t *codes, const int16_t *state, int rows, int32_t sums[ROWS][4]) {
  int64_t apart = w->units * w->units;
#define CASE(g, r) case r: products(codes, apart, state, w->width, w->units, g, r, sums); break
  if (w->c) switch (rows) { CASE(4, 1); CASE(4, 2); CASE(4, 3); CASE(4, 4); }
  else switch (rows) { CASE(3, 1); CASE(3, 2); CASE(3, 3); CASE(3, 4); }
#undef CASE
}

/* ----------------------------------------------------------------------------------------------------------- steps */
static float most_of(const Job *w) { /* the largest code of the state: sums stay below 2^31 */
  int64_t most = INT32_MAX / (128 * w->units);
  return most > 32767 ? 32767 : (float)most;
}

static inline void write_state(const Job *w, int64_t step, int64_t row, int64_t unit, int64_t n, V h, float inverse) {
  int16_t *to = w->state + (((step + 1) & 1) * w->batch + row) * w->width + unit;
  int bad = 0;
#if FAST
  __mmask16 some = n < L ? (__mmask16)((1u << n) - 1) : 0xffff, number = _mm512_cmp_ps_mask((__m512)h, (__m512)h, _CMP_ORD_Q);
  __m512i codes = _mm512_maskz_cvtps_epi32(number, (__m512)(h * inverse));
  _mm512_mask_cvtsepi32_storeu_epi16(to, some, codes);
  bad = (some & ~number) != 0;
#else
  for (int64_t j = 0; j < n; j++) {
    bad |= h[j] != h[j];
    to[j] = h[j] == h[j] ? (int16_t)lrintf(h[j] * inverse) : 0;
  }
#endif
  if (bad && __atomic_load_n(&w->bad[row], __ATOMIC_RELAXED) > step)
    __atomic_store_n(&w->bad[row], step, __ATOMIC_RELAXED);
}

/* `n` units from `unit` on, of row `row` of the batch; `z` are the sums. */
static inline __attribute__((always_inline)) void cell(const Job *w, int64_t step, int64_t at, int64_t row, int64_t unit,
                                                       int64_t n, float z[4][L]) {
  int64_t u = w->units, to = (w->offsets[at] + row) * u, gates = w->c ? 4 : 3;
  const float *x = w->x + (w->offsets[at] + row) * u * gates + unit;
  float *h = w->h + row * u + unit;
  V a = load(x, n), b = load(x + u, n), d = load(x + 2 * u, n), y;
  V z0 = load(z[0], L), z1 = load(z[1], L), z2 = load(z[2], L);
  if (w->c) {
    float *c = w->c + row * u + unit;
    V now = sigmoid(z1 + b) * load(c, n) + sigmoid(z0 + a) * tanh_of(z2 + d);
    y = sigmoid(load(z[3], L) + load(x + 3 * u, n)) * tanh_of(now);
    store(c, now, n);
    store(w->out + 2 * to + unit, y, n);
    store(w->out + 2 * to + u + unit, now, n);
  } else {
    if (w->bias) {
      z0 += load(w->bias + unit, n);
      z1 += load(w->bias + u + unit, n);
      z2 += load(w->bias + 2 * u + unit, n);
    }
    V new = tanh_of(d + sigmoid(z0 + a) * z2);
    y = new + sigmoid(z1 + b) * (load(h, n) - new);
    store(h, y, n);
    store(w->out + to + unit, y, n);
  }
  write_state(w, step, row, unit, n, y, 1 / w->scales[row]);
}

static void units(const Job *w, int64_t step, int64_t begin, int64_t end) {
  int64_t at = w->reverse ? w->steps - 1 - step : step, rows = w->sizes[at], gates = w->c ? 4 : 3;
  int64_t seen = w->reverse ? (at + 1 < w->steps ? w->sizes[at + 1] : 0) : step ? rows : 0; /* rows past their first */
  const int16_t *state = w->state + (step & 1) * w->batch * w->width;
  for (int64_t unit = begin; unit < end; unit += L) {
    int64_t n = end - unit < L ? end - unit : L;
    for (int64_t row = 0; row < rows; row += ROWS) {
      int some = rows - row < ROWS ? (int)(rows - row) : ROWS;
      float z[ROWS][4][L] = {{{0}}}, by[ROWS];
      for (int r = 0; r < some; r++) {
        float own = row + r < seen ? w->scales[row + r] : w->first_scale[row + r];
        by[r] = __atomic_load_n(&w->bad[row + r], __ATOMIC_RELAXED) < step ? NAN : own;
      }
      for (int64_t j = 0; j < n; j++) {
        int32_t sums[ROWS][4];
        products_of(w, w->codes + (unit + j) * w->units, state + row * w->width, some, sums);
        for (int r = 0; r < some; r++)
          for (int g = 0; g < gates; g++)
            z[r][g][j] = (float)sums[r][g] * by[r] * w->scale[(g * w->units + unit + j) * w->scale_step];
      }
      for (int r = 0; r < some; r++) cell(w, step, at, row + r, unit, n, z[r]);
    }
  }
}

static void begin(Job *w) {
  float most = most_of(w);
  memset(w->state, 0, sizeof(int16_t) * (size_t)(2 * w->batch * w->width));
  for (int64_t n = 0; n < w->batch; n++) {
    const float *h = w->first + n * w->units;
    float size = 0, none = 0;
    for (int64_t k = 0; k < w->units; k++) {
      size = fabsf(h[k]) > size ? fabsf(h[k]) : size;
      none += h[k] * 0;
    }
    w->bad[n] = none == 0 ? w->steps : -1;
    if (none != 0 || size == 0) size = 1;
    w->scales[n] = (w->c || size < 1 ? 1 : size) / most;
    w->first_scale[n] = w->c ? size / most : w->scales[n];
    for (int64_t k = 0; k < w->units && none == 0; k++)
      w->state[n * w->width + k] = w->state[(w->batch + n) * w->width + k] = (int16_t)lrintf(h[k] / w->first_scale[n]);
  }
}

static void work(void *data) {
  Job *w = data;
  int64_t blocks = (w->units + L - 1) / L, ticket;
  while ((ticket = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->steps * w->parts) {
    int64_t step = ticket / w->parts, part = ticket % w->parts;
    int64_t from = blocks * part / w->parts * L, to = blocks * (part + 1) / w->parts * L;
    for (int spins = 0; __atomic_load_n(&w->done, __ATOMIC_ACQUIRE) < step * w->parts; spins++)
      if (spins > 1000) sched_yield();
    units(w, step, from, to < w->units ? to : w->units);
    __atomic_fetch_add(&w->done, 1, __ATOMIC_RELEASE);
  }
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

int run(Job *w, Parallel *parallel, unsigned threads) {
  int64_t blocks = (w->units + L - 1) / L, each = w->batch * w->units * w->units * (w->c ? 4 : 3);
  int64_t worth = each >> 18; /* what is worth a thread's while: a few microseconds */
  w->parts = worth < threads ? worth : threads;
  w->parts = w->parts < 1 || !parallel ? 1 : w->parts > blocks ? blocks : w->parts;
  w->next = w->done = 0;
  begin(w);
  if (w->parts > 1) parallel(work, w, (unsigned)w->parts, 0);
  else work(w);
  return 0;
}
