/* Levels of a block of columns of a weight, each made up for by those behind it: the inner loops of `_columns.py`.

   Matrices are [in, out]; a lane is an output, and outputs are independent of each other. What a step does beyond its
   block is a matrix product, and left to the caller.

   No OpenMP here: `run` is handed the parallel region of the runtime that torch has loaded. Threads take lanes off a
   counter until none is left. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, INNER = 32 }; /* outputs at a time; columns between two updates of the rest of a block */
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

typedef struct {
  float *w;                /* compensate: weights [in, out], changed. descend: the gradient, read */
  const float *m;          /* [in, in]: the factor of the inverse, upper triangular; the Hessian */
  float *k, *scale, *zero; /* levels [in, out]; parameters [groups, out], zero NULL if symmetric */
  float *result;           /* [b - a, out]: errors, in units of what they cost; how far values moved */
  const float *importance; /* of each column, for a search of scales; or NULL */
  const int32_t *group;    /* of each column */
  const int32_t *end;      /* where the group that begins at a column ends, if its parameters are to be found; else 0 */
  int64_t in, out, a, b;   /* the block is columns [a, b) */
  float qmin, qmax, low, high, max_bound, min_scale; /* codes; levels of a symmetric scheme; what scales may be */
  int32_t lopsided, many_bits, descend, fit;         /* see `Levels.lopsided`; which candidates; what to do */
  int64_t next, failed;
} Job;

int64_t job_size(void) { return (int64_t)sizeof(Job); }

/* ------------------------------------------------------------------------------------------------------- numbers */
static inline Vec all(float x) { return (Vec){0} + x; }
static inline Vec pick(Mask where, Vec a, Vec b) { return (Vec)(((Mask)a & where) | ((Mask)b & ~where)); }
static inline Vec least(Vec a, Vec b) { return pick(a < b, a, b); }
static inline Vec most(Vec a, Vec b) { return pick(a > b, a, b); }
static inline Vec clamp(Vec x, Vec low, Vec high) { return least(most(x, low), high); }
static inline Vec size_of(Vec x) { return (Vec)((Mask)x & 0x7fffffff); }

/* To the nearest whole number, of two the even one; numbers beyond 2^20 come out somewhere beyond that. */
static inline Vec nearest_whole(Vec x) {
  const Vec magic = all(0x1.8p23f);
  return (clamp(x, all(-0x1p20f), all(0x1p20f)) + magic) - magic;
}

/* As float16 holds it, where that can. */
static inline Vec stored(Vec x) {
  Mask b = (Mask)x, rounded = (b + 0xfff + ((b >> 13) & 1)) & ~0x1fff, fits = (size_of(x) >= 0x1p-14f) & (size_of(x) <= 65504.0f);
  return pick(fits, (Vec)rounded, x);
}

static inline Vec usable(Vec scale, float min) { return pick(scale == 0, all(1), most(scale, all(min))); }

static inline Vec load(const float *p, int n) {
  Vec v = all(1);
  if (n == LANES) memcpy(&v, p, sizeof v);
  else memcpy(&v, p, 4 * (size_t)n);
  return v;
}

static inline void save(float *p, Vec v, int n) {
  if (n == LANES) memcpy(p, &v, sizeof v);
  else memcpy(p, &v, 4 * (size_t)n);
}

typedef struct { Vec scale, zero; } Params;

static inline Vec level(const Job *j, Vec w, Params p) {
  Vec k = nearest_whole(w / p.scale);
  return j->zero ? clamp(k, j->qmin - p.zero, j->qmax - p.zero) : clamp(k, all(j->low), all(j->high));
}

static inline Params params_of(const Job *j, int64_t group, int64_t lane, int n) {
  int64_t at = group * j->out + lane;
  return (Params){load(j->scale + at, n), j->zero ? load(j->zero + at, n) : all(0)};
}

/* -------------------------------------------------------------------------------------------- scales of a group */
typedef struct { Params best; Vec error, energy; } Search;

/* Levels with these parameters, and the scale that suits them best: kept if their error is the least so far. */
static void offer(const Job *j, Search *s, const Vec *w, const float *cost, int64_t n, Params p) {
  Vec along = all(0), square = all(0), fitted, error;
  for (int64_t i = 0; i < n; i++) {
    Vec k = level(j, w[i], p), weighted = k * cost[i];
    along += weighted * w[i];
    square += weighted * k;
  }
  fitted = along / square;
  fitted = pick((square > 0) & (fitted != 0) & (size_of(fitted) < __builtin_inff()), stored(fitted), p.scale);
  error = s->energy + fitted * (fitted * square - 2 * along);
  Mask better = error < s->error;
  s->error = pick(better, error, s->error);
  s->best.scale = pick(better, fitted, s->best.scale);
  s->best.zero = pick(better, p.zero, s->best.zero);
}

static Vec error_of(const Job *j, const Vec *w, const float *cost, int64_t n, Params p) {
  Vec sum = all(0), scale = stored(p.scale);
  for (int64_t i = 0; i < n; i++) {
    Vec off = level(j, w[i], p) * scale - w[i];
    sum += off * off * cost[i];
  }
  return sum;
}

static Params find(const Job *j, const Vec *w, const float *cost, int64_t n) {
  static const float FEW[] = {1, .95f, .9f, .85f, .8f, .74f, .66f, .56f}, MANY[] = {1, .98f, .95f, .9f};
  Vec low = all(0), high = all(0), bound = all(j->max_bound);
  Params full = {all(1), all(0)};
  for (int64_t i = 0; i < n; i++) { low = least(low, w[i]); high = most(high, w[i]); }
  low = most(low, -bound);
  high = least(high, bound);
  if (j->zero) {
    full.scale = usable((high - low) / (j->qmax - j->qmin), j->min_scale);
    full.zero = clamp(j->qmin - nearest_whole(low / full.scale), all(j->qmin), all(j->qmax));
  } else {
    full.scale = usable(most(-low, high) / (j->lopsided ? -j->low : j->high), j->min_scale);
    if (j->lopsided) full.scale = pick(high > -low, -full.scale, full.scale);
  }
  if (cost) {
    Search s = {{all(1), all(0)}, all(__builtin_inff()), all(0)};
    Mask better;
    for (int64_t i = 0; i < n; i++) s.energy += w[i] * w[i] * cost[i];
    for (int i = 0; i < (j->many_bits ? 4 : 8); i++)
      offer(j, &s, w, cost, n, (Params){full.scale * (j->many_bits ? MANY[i] : FEW[i]), full.zero});
    for (int round = 0; round < (j->many_bits ? 1 : 2); round++) {
      offer(j, &s, w, cost, n, s.best);
      for (int step = -1; j->zero && step <= 1; step += 2)
        offer(j, &s, w, cost, n, (Params){s.best.scale, clamp(s.best.zero + (float)step, all(j->qmin), all(j->qmax))});
    }
    better = error_of(j, w, cost, n, s.best) < error_of(j, w, cost, n, full);
    full.scale = pick(better, s.best.scale, full.scale);
    full.zero = pick(better, s.best.zero, full.zero);
  }
  full.scale = stored(full.scale);
  return full;
}

/* --------------------------------------------------------------------------------------------- two ways over them */
/* rest[t] -= sum_i m[i][t] by[i], i in [c, d), t in [from, to) */
static void update(const Job *j, Vec *rest, const Vec *by, int64_t c, int64_t d, int64_t from, int64_t to) {
  int64_t t = from, i;
  for (; t + 4 <= to; t += 4) {
    Vec s0 = rest[t], s1 = rest[t + 1], s2 = rest[t + 2], s3 = rest[t + 3];
    for (i = c; i < d; i++) {
      const float *m = j->m + i * j->in + t;
      Vec e = by[i];
      s0 -= m[0] * e;
      s1 -= m[1] * e;
      s2 -= m[2] * e;
      s3 -= m[3] * e;
    }
    rest[t] = s0; rest[t + 1] = s1; rest[t + 2] = s2; rest[t + 3] = s3;
  }
  for (; t < to; t++) for (i = c; i < d; i++) rest[t] -= j->m[i * j->in + t] * by[i];
}

/* Pointers into what is kept of a block are moved so that columns have their own numbers. */
static void compensate(const Job *j, int64_t lane, int n, Vec *w, Vec *error, int64_t reach) {
  Params p = {all(1), all(0)};
  int64_t c, d, i, known = -1;
  for (i = j->a; i < reach; i++) w[i] = load(j->w + i * j->out + lane, n);
  for (c = j->a; c < j->b; c = d) {
    for (d = c + 1; d < j->b && d < c + INNER && !(j->end && j->end[d]); d++) {}
    if (j->end && j->end[c]) {
      int64_t at = j->group[c] * j->out + lane;
      p = find(j, w + c, j->importance ? j->importance + c : NULL, j->end[c] - c);
      known = j->group[c];
      save(j->scale + at, p.scale, n);
      if (j->zero) save(j->zero + at, p.zero, n);
    }
    for (i = c; i < d; i++) {
      const float *r = j->m + i * j->in;
      Vec k;
      if (j->group[i] != known) p = params_of(j, known = j->group[i], lane, n);
      k = level(j, w[i], p);
      save(j->k + i * j->out + lane, k, n);
      error[i] = (w[i] - k * p.scale) * (1 / r[i]);
      for (int64_t t = i + 1; t < d; t++) w[t] -= r[t] * error[i];
      save(j->result + (i - j->a) * j->out + lane, error[i], n);
    }
    update(j, w, error, c, d, d, j->b);
  }
}

static void descend(const Job *j, int64_t lane, int n, Vec *gradient, Vec *moved, Vec *k) {
  int64_t c, d, i, t;
  for (i = j->a; i < j->b; i++) {
    gradient[i] = load(j->w + i * j->out + lane, n);
    k[i] = load(j->k + i * j->out + lane, n);
  }
  for (c = j->a; c < j->b; c = d) {
    Params p = params_of(j, j->group[c], lane, n);
    for (d = c + 1; d < j->b && j->group[d] == j->group[c]; d++) {}
    for (i = c; i < d; i++) moved[i] = -k[i] * p.scale;
    if (j->fit) {
      Vec along = all(0), curvature = all(0), fitted, change;
      Mask good;
      for (i = c; i < d; i++) {
        const float *h = j->m + i * j->in;
        Vec sum = all(0);
        for (t = c; t < d; t++) sum += h[t] * k[t];
        curvature += k[i] * sum;
        along += k[i] * gradient[i];
      }
      fitted = stored(p.scale + along / curvature);
      /* 0 would lose the group for good; and a zero point stands for 0 only while the scale keeps its sign */
      good = (curvature > 0) & (size_of(fitted) < __builtin_inff()) & (fitted * p.scale > 0);
      fitted = pick(good, fitted, p.scale);
      change = fitted - p.scale;
      p.scale = fitted;
      save(j->scale + j->group[c] * j->out + lane, p.scale, n);
      for (i = c; i < d; i++) {
        const float *h = j->m + i * j->in;
        Vec sum = all(0);
        for (t = c; t < d; t++) sum += h[t] * k[t];
        gradient[i] -= sum * change;
      }
    }
    for (i = c; i < d; i++) {
      const float *h = j->m + i * j->in;
      Vec found = level(j, k[i] * p.scale + gradient[i] * (1 / h[i]), p), change = (found - k[i]) * p.scale;
      k[i] = found;
      for (t = i + 1; t < d; t++) gradient[t] -= h[t] * change;
    }
    for (i = c; i < d; i++) {
      moved[i] += k[i] * p.scale;
      save(j->result + (i - j->a) * j->out + lane, moved[i], n);
      save(j->k + i * j->out + lane, k[i], n);
    }
    update(j, gradient, moved, c, d, d, j->b);
  }
}

/* ---------------------------------------------------------------------------------------------------- threads */
static void work(void *data) {
  Job *j = data;
  int64_t lane, reach = j->b, size = j->b - j->a, long_one;
  Vec *memory;
  for (int64_t i = j->a; j->end && i < j->b; i++) if (j->end[i] > reach) reach = j->end[i];
  long_one = reach - j->a;
  memory = aligned_alloc(sizeof(Vec), sizeof(Vec) * (size_t)(long_one + 2 * size));
  if (!memory) { __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED); return; }
  while ((lane = __atomic_fetch_add(&j->next, LANES, __ATOMIC_RELAXED)) < j->out) {
    int n = j->out - lane < LANES ? (int)(j->out - lane) : LANES;
    Vec *one = memory - j->a, *two = memory + long_one - j->a;
    if (j->descend) descend(j, lane, n, one, two, two + size);
    else compensate(j, lane, n, one, two, reach);
  }
  free(memory);
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* 0, or 1 if there was no memory. */
int run(Job *j, Parallel *parallel, unsigned threads) {
  j->next = j->failed = 0;
  if (parallel && threads > 1 && j->out > LANES) parallel(work, j, threads, 0);
  else work(j);
  return (int)j->failed;
}
