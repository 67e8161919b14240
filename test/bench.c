/* bench.c: how fast this build is on this machine, as lines of CSV.
 *
 *   bench THREADS            the machine and the matrix product; with
 *                            -DOPENBLAS also as a share of OpenBLAS
 *   bench THREADS WORKLOAD   one workload of the table below, and the memory
 *                            it took (then predicted, where it is training)
 */
#include "../tbr.c"
#ifndef _WIN32
#include <sys/resource.h>
#endif
#ifdef OPENBLAS
#include <cblas.h>
#endif

/* Prints one figure. */
static void figure(const char *what, double value, const char *unit) {
  printf("\"%s\",%.6g,%s\n", what, value, unit);
}

static int double_order(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* The fused multiply-adds that one core can do, in GFLOP/s: more chains than
 * the latency needs, all in registers. */
static double peak(void) {
  enum { CHAINS = 10, ROUNDS = 2000000 };
  real acc[CHAINS][NR], sum = 0;
  double best = 0;
  for (int c = 0; c < CHAINS; c++)
    for (int j = 0; j < NR; j++) acc[c][j] = (real)(c + j * j);
  for (int run = 0; run < 5; run++) {
    double t = now();
    for (int i = 0; i < ROUNDS; i++)
      for (int c = 0; c < CHAINS; c++)
#pragma omp simd
        for (int j = 0; j < NR; j++)
          acc[c][j] = madd(acc[c][j], (real)0.9999999, (real)1e-7);
    double rate = 2.0 * CHAINS * NR * ROUNDS / (now() - t) * 1e-9;
    if (rate > best) best = rate;
  }
  for (int c = 0; c < CHAINS; c++) /* so that nothing is optimised away */
    for (int j = 0; j < NR; j++) sum += acc[c][j];
  return sum > -1 ? best : 0;
}

/* GB/s that one core reads from memory. */
static double reading(void) {
  size_t n = (size_t)1 << 26;
  real *x = mem_raw(n, sizeof *x), sum = 0;
  double best = 0;
  for (size_t i = 0; i < n; i++) x[i] = 1;
  for (int run = 0; run < 4; run++) {
    double t = now();
    sum += dot(x, x, n);
    double rate = (double)(n * sizeof *x) / (now() - t) * 1e-9;
    if (rate > best) best = rate;
  }
  free(x);
  return sum > 0 ? best : 0;
}

/* The best GFLOP/s of C (m,n) += A (m,k) B (k,n) in many runs, and, if there
 * is OpenBLAS, the median of the ratio to it, run by run. */
static double product(size_t m, size_t n, size_t k, int ta, int tb,
                      double *ratio) {
  enum { RUNS = 25, EACH = 4 };
  real *a = mem_new(m * k, sizeof *a), *b = mem_new(k * n, sizeof *b);
  real *c = mem_new(m * n, sizeof *c);
  double best = 0, share[RUNS] = {0};
  for (int run = 0; run < RUNS; run++) {
    double t = now(), ours;
    for (int i = 0; i < EACH; i++) tbr_gemm(m, n, k, a, ta, b, tb, c);
    ours = now() - t;
    double rate = 2.0 * EACH * (double)(m * n * k) / ours * 1e-9;
    if (rate > best) best = rate;
#ifdef OPENBLAS
    t = now();
    for (int i = 0; i < EACH; i++)
      cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans,
                  tb ? CblasTrans : CblasNoTrans, (int)m, (int)n, (int)k, 1, a,
                  (int)(ta ? m : k), b, (int)(tb ? k : n), 1, c, (int)n);
    share[run] = (now() - t) / ours;
#endif
  }
  qsort(share, RUNS, sizeof *share, double_order);
  *ratio = share[RUNS / 2];
  free(a), free(b), free(c);
  return best;
}

/* The machine and the product; a warning where that is far from the peak. */
static void machine(void) {
  static const size_t shape[][3] = {{768, 96, 96},     {768, 512, 96},
                                    {1024, 288, 288},  {1024, 1536, 288},
                                    {1024, 768, 768}};
  static const char *const kind[] = {"NN", "NT", "TN"};
  char what[80];
  double top = peak(), worst = 1e9, ratio;
  figure("threads", threads(), "");
  figure("multiply-adds of one core, peak", top, "GFLOP/s");
  figure("reading by one core", reading(), "GB/s");
  for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
    for (int k = 0; k < 3; k++) {
      const size_t *x = shape[s];
      double rate = product(x[0], x[1], x[2], k == 2, k == 1, &ratio);
      snprintf(what, sizeof what, "product %s, %zu x %zu x %zu", kind[k], x[0],
               x[1], x[2]);
      figure(what, rate, "GFLOP/s");
      if (ratio > 0) figure("  by that of OpenBLAS", ratio, "");
      if (rate < worst) worst = rate;
    }
  if (worst < top * threads() / 2)
    fprintf(stderr, "warning: the matrix product runs under half of the peak; "
            "see \"If it is slow\" in README.md\n");
}

/* train: `batch` windows of `tokens`, `steps` times, at most `rows` tokens at
 * a time, which is what activations take memory for; decode and evaluate:
 * `batch` prompts of `rows` tokens, up to 32 of them together in decode,
 * answered with `tokens` each. */
static const struct {
  const char *name, *kind;
  size_t dim, layers, heads, kv_heads, hidden, vocab, batch, tokens, steps,
      rows;
} workload[] = {
    {"train-default", "train", 96, 3, 4, 4, 256, 1536, 8, 96, 40, 768},
    {"train-288", "train", 288, 6, 6, 6, 768, 4096, 4, 256, 4, 1024},
    {"train-768", "train", 768, 12, 12, 12, 2048, 32000, 4, 256, 2, 256},
    {"train-smollm2", "train", 576, 30, 9, 3, 1536, 49152, 4, 256, 2, 1024},
    {"decode-15M-1", "decode", 288, 6, 6, 6, 768, 32000, 1, 256, 0, 1},
    {"decode-15M-8", "decode", 288, 6, 6, 6, 768, 32000, 8, 128, 0, 1},
    {"decode-15M-32", "decode", 288, 6, 6, 6, 768, 32000, 32, 64, 0, 1},
    {"decode-110M-1", "decode", 768, 12, 12, 12, 2048, 32000, 1, 256, 0, 1},
    {"evaluate-default", "evaluate", 96, 3, 4, 4, 256, 1536, 450, 40, 0, 24},
    {"evaluate-smollm2", "evaluate", 576, 30, 9, 3, 1536, 49152, 450, 96, 0,
     48}};

/* Tokens a second of forward, backward and AdamW, without the first step. */
static double training(TbrModel *m, size_t batch, size_t window, size_t steps,
                       size_t rows) {
  TbrSequences s = {0};
  Rng rng = rng_stream(1, FOR_ORDER, 0);
  int32_t *id = mem_new(window + 1, sizeof *id);
  for (size_t i = 0; i < batch; i++) {
    for (size_t j = 0; j <= window; j++)
      id[j] = (int32_t)rng_below(&rng, m->config.vocab);
    tbr_sequences_add(&s, id, id + 1, window);
  }
  TbrTraining o = {.steps = 1, .batch = batch, .rows = rows,
                   .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.98, .eps = 1e-8,
                   .clip = 1};
  double t, once = 0;
  for (int warm = 0; warm < 2; warm++) { /* the first finds memory untouched */
    t = now();
    tbr_train(m, NULL, &s, &o, NULL, NULL);
    once = now() - t;
  }
  t = now();
  o.steps = steps + 1;
  tbr_train(m, NULL, &s, &o, NULL, NULL);
  t = now() - t - once;
  tbr_sequences_free(&s);
  free(id);
  return (double)(steps * batch * window) / t;
}

/* Tokens a second, new and (if prompts are long) read, without setting up. */
static double decoding(const TbrModel *m, size_t n, size_t tokens,
                       size_t prompt_tokens) {
  TbrTokens *prompt = mem_new(n, sizeof *prompt);
  int32_t id[64];
  double t, once = 0;
  for (int i = 0; i < 64; i++) id[i] = i;
  for (size_t i = 0; i < n; i++)
    prompt[i] = (TbrTokens){id, prompt_tokens, prompt_tokens};
  TbrSampling o = {.top_p = 1, .tokens = 1, .stop = {-1, -1}};
  for (int warm = 0; warm < 2; warm++) { /* the first finds memory untouched */
    t = now();
    tbr_answers_free(tbr_generate(m, prompt, 1, &o, NULL), 1);
    once = now() - t;
  }
  t = now();
  o.tokens = tokens;
  tbr_answers_free(tbr_generate(m, prompt, n, &o, NULL), n);
  t = now() - t - once;
  free(prompt);
  return (double)(n * (tokens + prompt_tokens - 1)) / t;
}

/* Runs one workload. */
static void run(const char *name) {
  size_t i = 0, all = sizeof workload / sizeof *workload;
  while (i < all && strcmp(workload[i].name, name)) i++;
  if (i == all) tbr_fail("there is no workload \"%s\"", name);
  size_t dim = workload[i].dim, heads = workload[i].heads;
  size_t batch = workload[i].batch, tokens = workload[i].tokens;
  size_t steps = workload[i].steps, rows = workload[i].rows;
  TbrConfig c = {.vocab = workload[i].vocab, .dim = dim,
                 .layers = workload[i].layers, .heads = heads,
                 .kv_heads = workload[i].kv_heads, .head_dim = dim / heads,
                 .hidden = workload[i].hidden, .context = 512,
                 .rope_theta = 10000, .norm_eps = 1e-5, .tied = 1};
  TbrModel *m = tbr_model_new(&c);
  tbr_model_init(m, 1);
  int train = !strcmp(workload[i].kind, "train");
  figure(name, train ? training(m, batch, tokens, steps, rows)
                     : decoding(m, batch, tokens, rows),
         "tokens/s");
#ifndef _WIN32
  struct rusage u;
  getrusage(RUSAGE_SELF, &u);
  figure("  peak memory", (double)u.ru_maxrss / 1024, "MiB");
#endif
  if (train)
    figure("  predicted",
           (double)tbr_training_bytes(m, rows) / 1048576, "MiB");
  tbr_model_free(m);
}

int main(int argc, char **argv) {
  tbr_threads(argc > 1 ? atoi(argv[1]) : 0);
  if (argc > 2) run(argv[2]);
  else machine();
  return 0;
}
