/* total += x^T x, for bfloat16 x [rows, cols] and float32 total [cols, cols] that is symmetric, and stays so.

   Columns are dealt with in panels of WIDTH. Two rows of a panel are interleaved, as the processor's product of pairs
   takes them: the same memory serves for both factors. Only panels on and above the diagonal are computed.

   No OpenMP here: `run` is handed the parallel region of the runtime that torch has loaded. Threads take work off a
   counter until none is left. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define FAST 1
#else
#define FAST 0
#endif

enum { WIDTH = 48, HEIGHT = 8, DEPTH = 128 }; /* of a panel; rows of a tile; pairs of rows between two sums */

typedef struct {
  const uint16_t *x;
  uint32_t *pairs; /* memory: [panels, (rows + 1) / 2, WIDTH] */
  float *total;
  int64_t rows, cols, stride; /* stride: of the rows of x, in elements */
  int64_t next;
} Job;

int available(void) { return FAST; }
int width(void) { return WIDTH; }
int64_t job_size(void) { return (int64_t)sizeof(Job); }

#if FAST
static void interleave(const Job *w, int64_t panel) {
  int64_t first = panel * WIDTH, count = w->cols - first < WIDTH ? w->cols - first : WIDTH;
  uint32_t *out = w->pairs + panel * ((w->rows + 1) / 2) * WIDTH;
  for (int64_t r = 0; r < w->rows; r += 2, out += WIDTH) {
    const uint16_t *a = w->x + r * w->stride + first, *b = a + w->stride;
    int two = r + 1 < w->rows;
    for (int64_t c = 0; c < count; c++) out[c] = a[c] | (two ? (uint32_t)b[c] << 16 : 0);
    for (int64_t c = count; c < WIDTH; c++) out[c] = 0;
  }
}

/* out [HEIGHT, WIDTH] += a [n, HEIGHT]^T b [n, WIDTH], of pairs. */
static inline void tile(const uint32_t *a, const uint32_t *b, int64_t n, float *out) {
  __m512 sum[HEIGHT][3];
  for (int i = 0; i < HEIGHT; i++) for (int v = 0; v < 3; v++) sum[i][v] = _mm512_loadu_ps(out + i * WIDTH + 16 * v);
  for (int64_t k = 0; k < n; k++, a += WIDTH, b += WIDTH) {
    __m512bh right[3];
    for (int v = 0; v < 3; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
    for (int i = 0; i < HEIGHT; i++) {
      __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i]);
      for (int v = 0; v < 3; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, right[v]);
    }
  }
  for (int i = 0; i < HEIGHT; i++) for (int v = 0; v < 3; v++) _mm512_storeu_ps(out + i * WIDTH + 16 * v, sum[i][v]);
}

static void product(const Job *w, int64_t p, int64_t q) {
  float out[WIDTH * WIDTH] __attribute__((aligned(64)));
  int64_t pairs = (w->rows + 1) / 2, i0 = p * WIDTH, j0 = q * WIDTH;
  int64_t height = w->cols - i0 < WIDTH ? w->cols - i0 : WIDTH, wide = w->cols - j0 < WIDTH ? w->cols - j0 : WIDTH;
  const uint32_t *a = w->pairs + p * pairs * WIDTH, *b = w->pairs + q * pairs * WIDTH;
  memset(out, 0, sizeof out);
  for (int64_t k = 0; k < pairs; k += DEPTH) {
    int64_t n = pairs - k < DEPTH ? pairs - k : DEPTH;
    for (int i = 0; i < WIDTH; i += HEIGHT) tile(a + k * WIDTH + i, b + k * WIDTH, n, out + i * WIDTH);
  }
  for (int64_t i = 0; i < height; i++)
    for (int64_t j = 0; j < wide; j++) w->total[(i0 + i) * w->cols + j0 + j] += out[i * WIDTH + j];
  if (p != q)
    for (int64_t j = 0; j < wide; j++)
      for (int64_t i = 0; i < height; i++)
        w->total[(j0 + j) * w->cols + i0 + i] = w->total[(i0 + i) * w->cols + j0 + j];
}

static void interleave_all(void *data) {
  Job *w = data;
  int64_t p, panels = (w->cols + WIDTH - 1) / WIDTH;
  while ((p = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < panels) interleave(w, p);
}

static void multiply_all(void *data) {
  Job *w = data;
  int64_t t, q, panels = (w->cols + WIDTH - 1) / WIDTH;
  while ((t = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < panels * (panels + 1) / 2) {
    for (q = 0; t > q; q++) t -= q + 1; /* tiles (0, 0); (0, 1), (1, 1); (0, 2), ... */
    product(w, t, q);
  }
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

void run(Job *w, Parallel *parallel, unsigned threads) {
  void (*steps[])(void *) = {interleave_all, multiply_all};
  for (int s = 0; s < 2; s++) {
    w->next = 0;
    if (parallel && threads > 1) parallel(steps[s], w, threads, 0);
    else steps[s](w);
  }
}
#else
void run(void *w, void *parallel, unsigned threads) { (void)w; (void)parallel; (void)threads; }
#endif
