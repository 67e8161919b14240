/* bench.c: how fast this build is on this machine. Prints a table and writes
 * it as CSV to the file that the first argument names. */
#include "../tbr.c"

static FILE *csv;

/* Prints one figure, and adds it to the CSV. */
static void figure(const char *what, double value, const char *unit) {
  printf("%-52s %10.1f %s\n", what, value, unit);
  fprintf(csv, "\"%s\",%.6g,%s\n", what, value, unit);
}

/* The fused multiply-adds that one core can do, in GFLOP/s: more chains than
 * the latency needs, all in registers. */
static double peak(void) {
  enum { CHAINS = 10, ROUNDS = 2000000 };
  real acc[CHAINS][NR], best = 0;
  for (int c = 0; c < CHAINS; c++)
    for (int j = 0; j < NR; j++) acc[c][j] = (real)(c + j);
  for (int run = 0; run < 5; run++) {
    double t = now();
    for (int i = 0; i < ROUNDS; i++)
      for (int c = 0; c < CHAINS; c++)
#pragma omp simd
        for (int j = 0; j < NR; j++)
          acc[c][j] = madd(acc[c][j], (real)0.9999999, (real)1e-7);
    double rate = 2.0 * CHAINS * NR * ROUNDS / (now() - t) * 1e-9;
    if (rate > (double)best) best = (real)rate;
  }
  real sum = 0; /* so that nothing is optimised away */
  for (int c = 0; c < CHAINS; c++) sum += acc[c][c];
  return sum > -1 ? (double)best : 0;
}

/* The best GFLOP/s of C (m,n) += A (m,k) B (k,n) in a few runs. */
static double product(size_t m, size_t n, size_t k, int ta, int tb) {
  real *a = mem_new(m * k, sizeof *a), *b = mem_new(k * n, sizeof *b);
  real *c = mem_new(m * n, sizeof *c);
  double best = 0;
  for (int run = 0; run < 12; run++) {
    double t = now();
    for (int i = 0; i < 4; i++) tbr_gemm(m, n, k, a, ta, b, tb, c);
    double rate = 8.0 * (double)(m * n * k) / (now() - t) * 1e-9;
    if (rate > best) best = rate;
  }
  free(a), free(b), free(c);
  return best;
}

static TbrModel *random_model(size_t dim, size_t layers, size_t heads,
                              size_t hidden, size_t vocab) {
  TbrConfig c = {vocab, dim, layers, heads, heads, dim / heads, hidden, 512,
                 10000, 1e-5, 1};
  TbrModel *m = tbr_model_new(&c);
  tbr_model_init(m, 1);
  return m;
}

/* Tokens a second of forward, backward and AdamW. */
static double training(TbrModel *m, size_t batch, size_t window,
                       size_t steps) {
  TbrSequences s = {0};
  Rng rng = rng_stream(1, FOR_ORDER, 0);
  int32_t *id = mem_new(window + 1, sizeof *id);
  for (size_t i = 0; i < batch; i++) {
    for (size_t j = 0; j <= window; j++)
      id[j] = (int32_t)rng_below(&rng, m->config.vocab);
    tbr_sequences_add(&s, id, id + 1, window);
  }
  TbrTraining o = {.steps = steps, .batch = batch, .rows = batch * window,
                   .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.98, .eps = 1e-8,
                   .clip = 1};
  double t = now();
  tbr_train(m, NULL, &s, &o, NULL, "");
  t = now() - t;
  tbr_sequences_free(&s);
  free(id);
  return (double)(steps * batch * window) / t;
}

/* New tokens a second for `n` prompts together. */
static double decoding(const TbrModel *m, size_t n) {
  TbrTokens *prompt = mem_new(n, sizeof *prompt);
  int32_t id = 1;
  for (size_t i = 0; i < n; i++) prompt[i] = (TbrTokens){&id, 1, 1};
  TbrSampling o = {0, 1, 128, {-1, -1}, 0};
  double t = now();
  tbr_answers_free(tbr_generate(m, prompt, n, &o, NULL), n);
  t = now() - t;
  free(prompt);
  return (double)(n * o.tokens) / t;
}

int main(int argc, char **argv) {
  static const size_t shape[][3] = {{768, 96, 96},     {768, 512, 96},
                                    {1024, 288, 288},  {1024, 1536, 288},
                                    {1024, 768, 768}};
  static const char *const kind[] = {"NN", "NT", "TN"};
  char what[80];
  csv = fopen(argc > 1 ? argv[1] : "bench.csv", "w");
  if (!csv) tbr_fail("%s: cannot be written", argc > 1 ? argv[1] : "bench.csv");
  tbr_threads(argc > 2 ? atoi(argv[2]) : 0);
  fprintf(csv, "what,value,unit\n");
  int team = threads();
  double top = peak(), worst = 1e9;
  snprintf(what, sizeof what, "threads");
  figure(what, team, "");
  figure("multiply-adds of one core, peak", top, "GFLOP/s");
  for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
    for (int k = 0; k < 3; k++) {
      const size_t *x = shape[s];
      double rate = product(x[0], x[1], x[2], k == 2, k == 1);
      snprintf(what, sizeof what, "product %s, %zu x %zu x %zu", kind[k], x[0],
               x[1], x[2]);
      figure(what, rate, "GFLOP/s");
      if (rate < worst) worst = rate;
    }
  TbrModel *small = random_model(96, 3, 4, 256, 1536);
  TbrModel *large = random_model(288, 6, 6, 768, 4096);
  figure("training 96 wide, 3 layers, 8 x 96", training(small, 8, 96, 60),
         "tokens/s");
  figure("training 288 wide, 6 layers, 4 x 256", training(large, 4, 256, 4),
         "tokens/s");
  for (size_t n = 1; n <= 32; n += n == 1 ? 7 : 24) {
    snprintf(what, sizeof what, "decoding 288 wide, 6 layers, %zu together", n);
    figure(what, decoding(large, n), "tokens/s");
  }
  tbr_model_free(small);
  tbr_model_free(large);
  if (worst < top * team / 2)
    printf("warning: the matrix product runs under half of the peak; see "
           "\"If it is slow\" in README.md\n");
  if (fclose(csv)) tbr_fail("the CSV cannot be written to its end");
  return 0;
}
