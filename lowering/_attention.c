/* Attention of float32 on the CPU: softmax(scale q k^T + mask) v, a dozen queries at a time.

   The scores of a dozen queries for all keys stay in the cache: they are computed, made weights and multiplied by the
   values before the next dozen. Keys are transposed once for each head into panels of P, so that both products are one
   loop: rows of single numbers times vectors that lie side by side.

   A mask is added, or says which keys are seen; a query that sees none gives zeros, as torch's does. Threads are those
   of the runtime that torch has loaded (see _weight_only.c); they take runs of queries of one head off a counter. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_vectors.h"

enum { R = 12, P = 32 }; /* queries of a tile; keys or values beside each other in it */
typedef uint8_t B __attribute__((vector_size(16), aligned(1), may_alias));
enum { NO_MASK, ADDED, SEEN }; /* what a mask is: none, float32, bool */

typedef struct {
  const float *q, *k, *v;
  const void *mask;
  float *out;                     /* [batch, queries, heads, size], dense */
  int64_t batch, heads, queries, keys, size;
  int64_t q_step[3], k_step[3], v_step[3], mask_step[3]; /* of batch, head and row, in elements; rows are dense */
  int64_t each, next, failed;     /* queries of a thread's piece */
  float scale;
  int32_t mask_type, causal, unused;
} Job;

int64_t job_size(void) { return (int64_t)sizeof(Job); }

/* Whether the vectors are the machine's own: what is here would not be fast on others. */
int vectors(void) {
#if defined(__AVX512F__)
  return 1;
#else
  return 0;
#endif
}

/* e^x for x <= 0: 0 below -87, NaN goes to NaN. */
static inline V exp_of(V x) {
  V y = exp_within(pick((I)(x > -87), x, all(-87)));
  return pick((I)(x >= -87), y, pick((I)(x == x), all(0), x));
}

static float sum_of(V x) {
  float s = 0;
  for (int i = 0; i < L; i++) s += x[i];
  return s;
}

static float most_of(V x) {
  float s = x[0];
  for (int i = 1; i < L; i++) s = x[i] > s ? x[i] : s;
  return s;
}

/* out[r][:n L] = factor[r] sum over i of a[r][i] b[i][:n L], for `rows` of the R rows; the others repeat the last. */
static inline __attribute__((always_inline)) void tile(const float *a, int64_t a_step, const float *b, int64_t b_step,
                                                       int64_t many, const float *factor, float *out, int64_t out_step,
                                                       int64_t rows, const int n) {
  V sums[R][2];
  const float *row[R];
  for (int r = 0; r < R; r++) {
    row[r] = a + (r < rows ? r : rows - 1) * a_step;
    sums[r][0] = sums[r][1] = all(0);
  }
  for (int64_t i = 0; i < many; i++, b += b_step) {
    V x = *(const V *)b, y = n == 2 ? *(const V *)(b + L) : all(0);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      V w = all(row[r][i]);
      sums[r][0] += w * x;
      if (n == 2) sums[r][1] += w * y;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    if (r >= rows) break;
    *(V *)(out + r * out_step) = sums[r][0] * factor[r];
    if (n == 2) *(V *)(out + r * out_step + L) = sums[r][1] * factor[r];
  }
}

/* Keys [keys, size] as panels [keys / P][size][P], zeros behind the last. */
static void transposed(const float *k, int64_t step, int64_t keys, int64_t size, float *panels) {
  for (int64_t first = 0; first < keys; first += P, panels += P * size)
    for (int64_t j = 0; j < P; j++)
      for (int64_t d = 0; d < size; d++) panels[d * P + j] = first + j < keys ? k[(first + j) * step + d] : 0;
}

/* A row of the mask as float32, which are added; itself or in `buffer`. */
static const float *mask_row(const Job *w, int64_t at, float *buffer) {
  if (w->mask_type == ADDED) return (const float *)w->mask + at;
  const uint8_t *seen = (const uint8_t *)w->mask + at;
  for (int64_t i = 0; i < w->keys; i++) buffer[i] = seen[i] ? 0 : -INFINITY;
  return buffer;
}

/* Scores to e^(score - largest), 0 from `seen` up to `padded`; gives 1 / their sum, 0 if no key is seen. */
static float weights(float *s, const float *mask, int64_t seen, int64_t padded) {
  V most = all(-INFINITY), total = all(0);
  int64_t i;
  for (i = seen; i < padded; i++) s[i] = -INFINITY;
  if (mask) {
    for (i = 0; i + L <= seen; i += L) *(V *)(s + i) += *(const V *)(mask + i);
    for (; i < seen; i++) s[i] += mask[i];
  }
  for (i = 0; i < padded; i += L) {
    V x = *(V *)(s + i);
    most = pick((I)(x > most), x, most);
  }
  float largest = most_of(most), sum;
  if (largest == -INFINITY) largest = 0;
  for (i = 0; i < padded; i += L) {
    V e = exp_of(*(V *)(s + i) - largest);
    *(V *)(s + i) = e;
    total += e;
  }
  sum = sum_of(total);
  return sum == 0 ? 0 : 1 / sum;
}

static void attend(const Job *w, int64_t b, int64_t h, int64_t begin, int64_t end, const float *panels, float *scores,
                   float *buffer) {
  const float *q = w->q + b * w->q_step[0] + h * w->q_step[1], *v = w->v + b * w->v_step[0] + h * w->v_step[1];
  int64_t padded = (w->keys + P - 1) / P * P, out_step = w->heads * w->size;
  int64_t mask_at = b * w->mask_step[0] + h * w->mask_step[1];
  const float *mask = NULL;
  float scale[R], inverse[R];
  for (int r = 0; r < R; r++) scale[r] = w->scale;
  for (int64_t first = begin; first < end; first += R) {
    int64_t rows = end - first < R ? end - first : R, keys = w->keys, wide;
    if (w->causal && first + rows < keys) keys = first + rows;
    wide = (keys + P - 1) / P * P;
    for (int64_t j = 0; j < wide; j += P)
      tile(q + first * w->q_step[2], w->q_step[2], panels + j * w->size, P, w->size, scale, scores + j, padded, rows, 2);
    for (int64_t r = 0; r < rows; r++) {
      int64_t seen = w->causal && first + r + 1 < keys ? first + r + 1 : keys;
      if (w->mask_type && (!mask || w->mask_step[2])) mask = mask_row(w, mask_at + (first + r) * w->mask_step[2], buffer);
      inverse[r] = weights(scores + r * padded, mask, seen, wide);
    }
    float *out = w->out + ((b * w->queries + first) * w->heads + h) * w->size;
    int64_t e = 0;
    for (; e + P <= w->size; e += P) tile(scores, padded, v + e, w->v_step[2], keys, inverse, out + e, out_step, rows, 2);
    if (e < w->size) tile(scores, padded, v + e, w->v_step[2], keys, inverse, out + e, out_step, rows, 1);
  }
}

static void work(void *data) {
  Job *w = data;
  int64_t padded = (w->keys + P - 1) / P * P, runs = (w->queries + w->each - 1) / w->each;
  int64_t total = w->batch * w->heads * runs, item, last = -1;
  float *panels = aligned_alloc(64, sizeof(float) * (size_t)(padded * (w->size + R + 1)));
  if (!panels) { w->failed = 1; return; }
  float *scores = panels + padded * w->size, *buffer = scores + padded * R;
  while ((item = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < total) {
    int64_t head = item / runs, b = head / w->heads, h = head % w->heads, begin = item % runs * w->each;
    if (head != last)
      transposed(w->k + b * w->k_step[0] + h * w->k_step[1], w->k_step[2], w->keys, w->size, panels);
    last = head;
    attend(w, b, h, begin, begin + w->each < w->queries ? begin + w->each : w->queries, panels, scores, buffer);
  }
  free(panels);
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* All of it. 0, or 1 if there was no memory. */
int run(Job *w, Parallel *parallel, unsigned threads) {
  w->next = w->failed = 0;
  if (parallel && threads > 1) parallel(work, w, threads, 0);
  else work(w);
  return (int)w->failed;
}
