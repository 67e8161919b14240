/* Chapters 12 and 13: exact arithmetic, random numbers, the matrix product. */
#include "../tbr.c"
#include "check.h"

/* ---- exp, log, sin, cos against the C library ----------------------------- */

static double largest_error;

/* What tbr.h promises; and the rounding of what it is compared with, where
 * the library has nothing finer than double. */
static const double bound = 5e-16 + (LDBL_MANT_DIG > DBL_MANT_DIG ? 0 : 1.2e-16);

/* Keeps the largest error of got, relative to size. */
static void error_of(double got, long double want, long double size) {
  double e = (double)(fabsl((long double)got - want) / size);
  if (!(e <= largest_error)) largest_error = e;
}

static void test_functions(void) {
  enum { DRAWS = 400000 };
  Rng r = rng_stream(1, FOR_INIT, 0);
  largest_error = 0;
  for (size_t i = 0; i < DRAWS; i++) {
    double x = (rng_uniform(&r) * 2 - 1) * (i % 2 ? 700 : 2);
    error_of(tbr_exp(x), expl(x), expl(x));
  }
  AT_MOST(largest_error, bound);
  largest_error = 0;
  for (size_t i = 0; i < DRAWS; i++) {
    double x = i % 2 ? rng_uniform(&r) * 2 + 1e-300
                     : bits_double(rng_next(&r) >> 2); /* all below 2 */
    if (x > 0 && x != 1) error_of(tbr_log(x), logl(x), fabsl(logl(x)));
  }
  AT_MOST(largest_error, bound);
  largest_error = 0;
  for (size_t i = 0; i < DRAWS; i++) {
    double x = (rng_uniform(&r) * 2 - 1) * (i % 2 ? 1048576 : 7);
    error_of(tbr_sin(x), sinl(x), 1);
    error_of(tbr_cos(x), cosl(x), 1);
  }
  AT_MOST(largest_error, bound);
  largest_error = 0;
  for (size_t i = 0; i < DRAWS; i++) {
    float x = (float)((rng_uniform(&r) * 2 - 1) * (i % 2 ? 87 : 1));
    error_of((double)tbr_expf(x), expl(x), expl(x));
  }
  AT_MOST(largest_error, 2e-7); /* here relative */
}

static void test_function_ends(void) {
  CHECK(tbr_exp(0) == 1 && tbr_expf(0) == 1 && tbr_log(1) == 0);
  CHECK(tbr_sin(0) == 0 && tbr_cos(0) == 1);
  CHECK(tbr_exp(1e9) == tbr_exp(700) && tbr_exp(-1e9) == tbr_exp(-700));
  CHECK(tbr_exp(INFINITY) == tbr_exp(700) && isnan(tbr_exp(NAN)));
  CHECK(tbr_expf(-INFINITY) == tbr_expf(-87) && tbr_expf(-87) > 0);
  CHECK(tbr_expf(1e30f) == tbr_expf(88) && tbr_expf(88) < INFINITY);
  CHECK(isnan(tbr_expf(NAN)));
  CHECK(tbr_log(0) == -INFINITY && isnan(tbr_log(-1)) && isnan(tbr_log(NAN)));
  CHECK(tbr_log(INFINITY) == INFINITY);
  NEAR(tbr_log(5e-324), -744.44007192138122, 1e-12);
}

/* ---- the fused multiply-add ----------------------------------------------- */

static int same_float(float a, float b) {
  return (isnan(a) && isnan(b)) || float_bits(a) == float_bits(b);
}

/* One triple; counts once for a whole test, so it returns 0 or 1. */
static size_t fma_differs(float a, float b, float c) {
  float got = tbr_soft_fmaf(a, b, c), want = fmaf(a, b, c);
  if (same_float(got, want)) return 0;
  printf("  fma(%a, %a, %a) is %a, should be %a\n", (double)a, (double)b,
         (double)c, (double)got, (double)want);
  return 1;
}

static void test_fma(void) {
  static const uint32_t special[] = {
      0, 1, 2, 0x7fffff, 0x800000, 0x800001, 0x3f800000, 0x3f800001,
      0x3f7fffff, 0x33800000, 0x33000000, 0x34000000, 0x7f7fffff, 0x7f800000,
      0x7fc00000, 0x00ffffff, 0x4b800000, 0x4b800001, 0x40490fdb, 0x1f800000,
      0x20000000, 0x5f000000, 0x64000001, 0x0c800000, 0x72ffffff};
  enum { N = sizeof special / sizeof *special };
  size_t wrong = 0;
  for (size_t i = 0; i < N * 2 && wrong < 5; i++)
    for (size_t j = 0; j < N * 2; j++)
      for (size_t k = 0; k < N * 2; k++)
        wrong += fma_differs(bits_float(special[i / 2] | (uint32_t)(i & 1) << 31),
                             bits_float(special[j / 2] | (uint32_t)(j & 1) << 31),
                             bits_float(special[k / 2] | (uint32_t)(k & 1) << 31));
  EQUAL(wrong, 0u);
  Rng r = rng_stream(2, FOR_INIT, 0);
  for (size_t i = 0; i < 2000000 && wrong < 5; i++) { /* any bits at all */
    uint64_t u = rng_next(&r), v = rng_next(&r);
    wrong += fma_differs(bits_float((uint32_t)u), bits_float((uint32_t)(u >> 32)),
                         bits_float((uint32_t)v));
  }
  EQUAL(wrong, 0u);
  for (size_t i = 0; i < 2000000 && wrong < 5; i++) { /* c near -a b, and ties */
    uint64_t u = rng_next(&r);
    float a = bits_float(0x3f800000u | (uint32_t)(u & 0x7fffff));
    float b = bits_float(0x3f800000u | (uint32_t)(u >> 32 & 0x7fffff));
    float c = -(a * b);
    if (i % 4 == 1) c = bits_float(float_bits(c) + (uint32_t)(u >> 60));
    if (i % 4 == 2) c = bits_float(0x4b000000u + (uint32_t)(u >> 40));
    if (i % 4 == 3) { /* into the subnormal numbers, where halves are tied */
      a = bits_float(float_bits(a) & 0xfffff000u) * 0x1p-75f;
      b = bits_float(float_bits(b) & 0xfffff000u) * 0x1p-70f;
      c = (u >> 59 & 1 ? -1.0f : 1.0f) * bits_float((uint32_t)(u >> 61));
    }
    wrong += fma_differs(a, b, c);
    /* c plus or minus half a unit, less too little for a double to hold:
     * rounded twice, this would go to the even neighbour. */
    float tiny = bits_float((uint32_t)(127 - 15 - i % 9) << 23);
    a = (1 + tiny) * 0x1p-12f;
    b = (1 - tiny) * (u >> 40 & 1 ? 0x1p-12f : -0x1p-12f);
    c = bits_float(0x3f800000u | (uint32_t)(u & 0x7fffff));
    wrong += fma_differs(a, b, c) + fma_differs(a, -b, -c);
  }
  EQUAL(wrong, 0u);
}

/* ---- random numbers and hashes --------------------------------------------- */

static void test_random(void) {
  Rng r = {1234567}; /* the values that everybody's splitmix64 gives */
  CHECK(rng_next(&r) == 6457827717110365317ULL);
  CHECK(rng_next(&r) == 3203168211198807973ULL);
  CHECK(rng_next(&r) == 9817491932198370423ULL);
  CHECK(hash_bytes(HASH_START, "foobar", 6) == 0x85944171f73967e8ULL);
  CHECK(rng_stream(1, 2, 3).state != rng_stream(1, 3, 2).state);
  CHECK(rng_stream(1, 2, 3).state != rng_stream(2, 1, 3).state);
  size_t bin[10] = {0}, order[100], seen[100] = {0}, below[7] = {0};
  double mean = 0, square = 0, least = 1, most = 0, n = 100000;
  for (size_t i = 0; i < 100000; i++) {
    double x = rng_uniform(&r), y = rng_normal(&r);
    if (x < least) least = x;
    if (x > most) most = x;
    bin[(size_t)(x * 10) % 10]++;
    below[rng_below(&r, 7)]++;
    mean += y / n;
    square += y * y / n;
  }
  CHECK(least >= 0 && least < 1e-3 && most < 1 && most > 0.999);
  for (size_t i = 0; i < 10; i++) NEAR(bin[i], n / 10, 5 * sqrt(n * 0.09));
  for (size_t i = 0; i < 7; i++) NEAR(below[i], n / 7, 5 * sqrt(n / 7 * 6 / 7));
  NEAR(mean, 0, 5 / sqrt(n));
  NEAR(square, 1, 5 * sqrt(2 / n));
  shuffle(order, 100, &r);
  for (size_t i = 0; i < 100; i++) seen[order[i]]++;
  for (size_t i = 0; i < 100; i++) EQUAL(seen[i], 1u);
}

static void test_dot(void) {
  real a[LANES * 5], b[LANES * 5];
  Rng r = rng_stream(3, FOR_INIT, 0);
  for (size_t n = 0; n <= LANES * 5; n++) {
    double want = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
      a[i] = (real)rng_normal(&r), b[i] = (real)rng_normal(&r);
      want += (double)a[i] * (double)b[i];
      size += fabs((double)a[i] * (double)b[i]);
    }
    NEAR(dot(a, b, n), want, 1e-6 * size);
  }
}

/* ---- the matrix product ------------------------------------------------------ */

/* C as chapter 3 promises it: k ascending, one fused multiply-add each. */
static void naive(size_t m, size_t n, size_t k, const real *a, int ta,
                  const real *b, int tb, real *c) {
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++)
      for (size_t p = 0; p < k; p++)
        c[i * n + j] = madd(ta ? a[p * m + i] : a[i * k + p],
                            tb ? b[j * k + p] : b[p * n + j], c[i * n + j]);
}

/* The largest error of c against the product in double, as a share of what
 * rounding allows: one unit for each of the k+1 terms. */
static double excess(size_t m, size_t n, size_t k, const real *a, int ta,
                     const real *b, int tb, const real *before,
                     const real *c) {
  double worst = 0;
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) {
      double sum = (double)before[i * n + j], size = fabs(sum);
      for (size_t p = 0; p < k; p++) {
        double x = (double)(ta ? a[p * m + i] : a[i * k + p]) *
                   (double)(tb ? b[j * k + p] : b[p * n + j]);
        sum += x;
        size += fabs(x);
      }
      double e = fabs((double)c[i * n + j] - sum) /
                 (size * (double)(k + 1) * 6e-8 + 1e-30);
      if (!(e <= worst)) worst = e;
    }
  return worst;
}

static real *numbers(size_t n, Rng *r) {
  real *x = mem_raw(n, sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = (real)(float)rng_normal(r);
  return x;
}

/* One shape: all transposes, and the same bits on any number of threads. */
static void one_shape(size_t m, size_t n, size_t k, Rng *r) {
  static const int team[] = {1, 2, 3, 7};
  real *a = numbers(m * k, r), *b = numbers(k * n, r), *old = numbers(m * n, r);
  real *want = mem_raw(m * n, sizeof *want), *got = mem_raw(m * n, sizeof *got);
  size_t teams = m * n * k < 100000 ? 1 : 4; /* small ones use one thread */
  for (int t = 0; t < 4; t++) {
    memcpy(want, old, m * n * sizeof *want);
    naive(m, n, k, a, t & 1, b, t >> 1, want);
    AT_MOST(excess(m, n, k, a, t & 1, b, t >> 1, old, want), 1);
    for (size_t i = 0; i < teams; i++) {
      memcpy(got, old, m * n * sizeof *got);
      tbr_threads(team[i]);
      tbr_gemm(m, n, k, a, t & 1, b, t >> 1, got);
      if (!BITS(got, want, m * n))
        printf("  shape %zu x %zu x %zu, transposes %d, %d threads\n", m, n, k,
               t, team[i]);
    }
  }
  tbr_threads(0);
  free(a), free(b), free(old), free(want), free(got);
}

static void test_gemm(void) {
  static const size_t side[] = {1,  2,  5,   6,   7,   12,  15, 16,
                                17, 95, 96,  97,  255, 256, 257, 513};
  Rng r = rng_stream(4, FOR_INIT, 0);
  for (size_t i = 0; i < 9; i++)
    for (size_t j = 0; j < 9; j++)
      for (size_t k = 0; k < 9; k++) one_shape(side[i], side[j], side[k], &r);
  for (size_t i = 0; i < 40; i++)
    one_shape(side[rng_below(&r, 15)], side[rng_below(&r, 16)],
              side[rng_below(&r, 15)], &r);
  one_shape(97, 1030, 7, &r); /* wider than a block */
  one_shape(17, 33, 600, &r); /* and deeper */
  one_shape(200, 6, 257, &r);
  one_shape(3, 4, 0, &r);     /* nothing to add */
}

int main(void) {
  test_functions();
  test_function_ends();
  test_fma();
  test_random();
  test_dot();
  test_gemm();
  return check_end();
}
