/* Chapters 4 and 5 against PyTorch; the golden numbers are golden_model.py's.
 * Arguments: where to write, and the folder of golden files. */
#include "../tbr.c"
#include "check.h"

static char *golden = "golden";
static const char *golden_model = "model"; /* which of them */

/* Numbers from the golden file of a model; n gets how many. */
static real *read_golden(const char *name, size_t *n) {
  char *path = format_string("%s/%s.safetensors", golden, golden_model);
  SafeTensors *st = st_open(path);
  const Json *v = json_get(st->header, name);
  if (!v) tbr_fail("%s: no \"%s\"", path, name);
  StEntry e = st_entry(v);
  *n = e.rows * e.columns;
  real *x = mem_raw(*n, sizeof *x);
  st_read(st, &(TbrTensor){.rows = e.rows, .columns = e.columns}, 1,
          &(Block){name, x}, 1);
  st_close(st);
  free(path);
  return x;
}

/* The largest errors seen, for the summary line. */
static double worst_norm, worst_largest;

/* Compares two tensors: the norm of the difference as a share of the norm,
 * and its largest entry as a share of the largest. */
static void compare(const char *name, const real *got, const real *want,
                    size_t n, double bound) {
  double difference = 0, size = 0, apart = 0, most = 0;
  for (size_t i = 0; i < n; i++) {
    double d = (double)got[i] - (double)want[i];
    difference += d * d;
    size += (double)want[i] * (double)want[i];
    apart = fmax(apart, fabs(d));
    most = fmax(most, fabs((double)want[i]));
  }
  double by_norm = sqrt(difference / size), by_largest = apart / most;
  int good = AT_MOST(by_norm, bound);
  good = AT_MOST(by_largest, bound) && good;
  if (!good) printf("  that is %s\n", name);
  worst_norm = fmax(worst_norm, by_norm);
  worst_largest = fmax(worst_largest, by_largest);
}

/* Compares every tensor of a block with the golden ones under a prefix. */
static void compare_all(const TbrModel *m, const real *block,
                        const char *prefix, double bound) {
  for (size_t i = 0; i < m->n_tensors; i++) {
    const TbrTensor *t = &m->tensor[i];
    size_t n;
    char *name = format_string("%s%s", prefix, t->name);
    real *want = read_golden(name, &n);
    EQUAL(n, t->rows * t->columns);
    compare(name, block + t->at, want, n, bound);
    free(want);
    free(name);
  }
}

static TbrSequences golden_sequences(void) {
  size_t n, sequences;
  real *id = read_golden("ids", &n), *target = read_golden("targets", &n);
  real *length = read_golden("lengths", &sequences);
  TbrSequences s = {0};
  for (size_t i = 0, at = 0; i < sequences; at += (size_t)length[i++]) {
    int32_t one[40], next[40];
    for (size_t j = 0; j < (size_t)length[i]; j++) {
      one[j] = (int32_t)id[at + j];
      next[j] = (int32_t)target[at + j];
    }
    tbr_sequences_add(&s, one, next, (size_t)length[i]);
  }
  free(id), free(target), free(length);
  return s;
}

static void test_step(const TbrModel *m, const TbrSequences *s) {
  TbrSequences b = {0};
  size_t n, targets = 0;
  for (size_t i = 0; i < s->n; i++)
    tbr_sequences_add(&b, s->id + s->first[i], s->target + s->first[i],
                  s->first[i + 1] - s->first[i]);
  TbrActs *a = tbr_acts_new(m, b.tokens);
  real *grad = mem_new(m->n_params, sizeof *grad);
  real *z = mem_raw(b.tokens * m->config.vocab, sizeof *z);
  real *logits = read_golden("logits", &n), *loss = read_golden("loss", &n);
  tbr_logits(m, a, &b, z);
  compare("logits", z, logits, b.tokens * m->config.vocab, 2e-6);
  for (size_t i = 0; i < b.tokens; i++) targets += b.target[i] >= 0;
  double scale = 1.0 / (double)targets;
  double got = tbr_loss(m, a, &b, grad, scale) * scale;
  NEAR(got, loss[0], 1e-6 * (double)loss[0]);
  compare_all(m, grad, "grad.", 5e-6);
  free(grad), free(z), free(logits), free(loss);
  tbr_acts_free(a);
  tbr_sequences_free(&b);
}

/* Compares what log.csv says of each step with PyTorch's. */
static void compare_log(const char *directory) {
  char *path = path_in(directory, "log.csv");
  Json *log = csv_read(path);
  const Json *row = log->child->next;
  size_t n, i = 0;
  real *loss = read_golden("losses", &n), *norm = read_golden("norms", &n);
  for (; row && i < n; row = row->next, i++) {
    NEAR(strtod(json_get(row, "loss")->string, NULL), loss[i],
         1e-5 * (double)loss[i]);
    NEAR(strtod(json_get(row, "gradient_norm")->string, NULL), norm[i],
         1e-4 * (double)norm[i]);
  }
  CHECK(i == n && !row);
  free(loss), free(norm), free(path);
  json_free(log);
}

static void test_ten_steps(TbrModel *m, const TbrSequences *s,
                           const char *directory) {
  TbrTokenizer *tok = tbr_tokenizer_train("a", 1, 262);
  TbrTraining t = {.steps = 10, .batch = s->n, .rows = 1000, .warmup = 3,
                   .cosine = 1, .lr = 1e-2, .last = 0.1, .beta1 = 0.9,
                   .beta2 = 0.98, .eps = 1e-8, .decay = 0.1, .clip = 0.7};
  char *state = path_in(directory, "model.safetensors");
  remove(state);
  tbr_train(m, tok, s, &t, directory, "golden");
  compare_all(m, m->param, "after.", 1e-5);
  compare_log(directory);
  TbrModel *again = tbr_model_load(directory); /* what was saved is the same */
  BITS(again->param, m->param, m->n_params);
  tbr_model_free(again);
  tbr_tokenizer_free(tok);
  free(state);
}

/* Another family, in shards or in 16 bits: one step, the decoder, and that
 * what is saved is the same again. */
static void test_family(const char *name, const char *directory) {
  golden_model = name;
  char *path = path_in(golden, name);
  TbrModel *m = tbr_model_load(path);
  TbrSequences s = golden_sequences();
  test_step(m, &s);
  tbr_model_save(m, directory, 1, 2, NULL);
  TbrModel *again = tbr_model_load(directory);
  CHECK(!memcmp(&again->config, &m->config, sizeof m->config));
  BITS(again->param, m->param, m->n_params);
  TbrTokens prompt = {s.id, 9, 0};
  TbrSampling greedy = {.tokens = 20, .stop = {-1, -1}};
  TbrTokens *said = tbr_generate(m, &prompt, 1, &greedy, NULL);
  EQUAL(said->n, 20u);
  /* What the decoder said, without one. */
  TbrActs *acts = tbr_acts_new(m, 29);
  real *logits = mem_raw(29 * m->config.vocab, sizeof *logits);
  int32_t id[29], target[29] = {0};
  memcpy(id, s.id, 9 * sizeof *id);
  memcpy(id + 9, said->id, 20 * sizeof *id);
  TbrSequences whole = {0};
  tbr_sequences_add(&whole, id, target, 29);
  tbr_logits(m, acts, &whole, logits);
  for (size_t i = 9; i < 29; i++) {
    const real *row = logits + (i - 1) * m->config.vocab;
    for (size_t j = 0; j < m->config.vocab; j++)
      CHECK(row[id[i]] >= row[j] - (real)1e-5);
  }
  tbr_acts_free(acts);
  free(logits);
  tbr_answers_free(said, 1);
  tbr_sequences_free(&whole);
  tbr_sequences_free(&s);
  tbr_model_free(m), tbr_model_free(again);
  free(path);
}

/* An adapter that PEFT saved: its logits, its gradients, and merged. */
static void test_adapter(const char *directory) {
  golden_model = "adapter";
  char *path = path_in(golden, "adapter");
  TbrModel *m = lora_read(path, 0), *merged = tbr_model_load(path);
  size_t n, tokens;
  real *ids = read_golden("ids", &tokens), *want = read_golden("logits", &n);
  real *z = mem_raw(n, sizeof *z);
  real *grad = mem_new(m->adapter->n_params, sizeof *grad);
  int32_t id[40], target[40];
  for (size_t i = 0; i < tokens; i++) {
    id[i] = (int32_t)ids[i];
    target[i] = 7 * id[i] % 53;
  }
  TbrSequences s = {0};
  tbr_sequences_add(&s, id, target, tokens);
  TbrActs *acts = tbr_acts_new(m, tokens);
  EQUAL(n, tokens * m->config.vocab);
  EQUAL(m->adapter->n_tensors, 12u);
  tbr_logits(m, acts, &s, z);
  compare("logits with an adapter", z, want, n, 1e-5);
  tbr_logits(merged, acts, &s, z);
  compare("logits of the merged model", z, want, n, 1e-5);
  tbr_loss(m, acts, &s, grad, 1.0 / (double)tokens);
  compare_all(m->adapter, grad, "", 1e-4);
  /* What tbr saves is the same adapter. */
  char *saved = path_in(directory, "adapter");
  tbr_model_save(m, saved, 1, 2, NULL);
  TbrModel *again = lora_read(saved, 0);
  BITS(again->adapter->param, m->adapter->param, m->adapter->n_params);
  SAME(again->lora.base, m->lora.base);
  NEAR(again->lora.alpha, m->lora.alpha, 0);
  FAILS(tbr_model_load_base(saved, 1), "is no model");
  tbr_acts_free(acts);
  tbr_sequences_free(&s);
  free(ids), free(want), free(z), free(grad), free(path), free(saved);
  tbr_model_free(m), tbr_model_free(merged), tbr_model_free(again);
}

/* What this adapter's file says is refused, once `old` there is `new`. */
static void bad_adapter(const char *directory, const char *old,
                        const char *new, const char *words) {
  char *from = path_in(golden, "adapter"), *to = path_in(directory, "bad");
  char *config = path_in(from, "adapter_config.json");
  char *weights = path_in(from, "adapter_model.safetensors");
  size_t n;
  char *text = read_file(config, NULL), *bytes = read_file(weights, &n);
  char *at = strstr(text, old);
  CHECK(at);
  Buf changed = {0};
  buf_add(&changed, text, (size_t)(at - text));
  buf_str(&changed, new);
  buf_str(&changed, at + strlen(old));
  make_directory(to);
  write_in(to, "adapter_config.json", changed.s, changed.n);
  write_in(to, "adapter_model.safetensors", bytes, n);
  FAILS(tbr_model_load(to), words);
  buf_free(&changed);
  free(from), free(to), free(config), free(weights), free(text), free(bytes);
}

static void test_bad_adapters(const char *directory) {
  bad_adapter(directory, "\"use_rslora\": false", "\"use_rslora\": true",
              "use_rslora");
  bad_adapter(directory, "\"use_dora\": false", "\"use_dora\": true",
              "use_dora");
  bad_adapter(directory, "\"bias\": \"none\"", "\"bias\": \"all\"", "bias");
  bad_adapter(directory, "\"alpha_pattern\": {}",
              "\"alpha_pattern\": {\"v_proj\": 2}", "alpha_pattern");
  bad_adapter(directory, "\"r\": 3", "\"r\": 4", "4 x 20");
  bad_adapter(directory, "\"r\": 3", "\"r\": 0", "rank from 1");
  bad_adapter(directory, "\"r\": 3", "\"r\": 1e300", "rank from 1");
  bad_adapter(directory, "\"v_proj\"", "\"lm_head\"", "targets");
  bad_adapter(directory, "\"v_proj\"", "\"xv_proj\"", "targets");
  bad_adapter(directory, "\"v_proj\"", "7", "targets");
  bad_adapter(directory, "golden/model", "golden/nowhere", "is no model");
}

int main(int argc, char **argv) {
  const char *folder = check_folder(argc, argv);
  if (argc > 2) golden = argv[2];
  char *path = path_in(golden, "model"), *directory = path_in(folder, "golden");
  TbrModel *m = tbr_model_load(path);
  TbrSequences s = golden_sequences();
  EQUAL(m->config.head_dim, 6u);
  EQUAL(m->config.kv_heads, 2u);
  NEAR(m->config.rope_theta, 500, 0);
  test_step(m, &s);
  test_ten_steps(m, &s, directory);
  test_family("qwen2", directory);
  test_family("llama3", directory);
  test_adapter(directory);
  test_bad_adapters(directory);
  if (getenv("VERBOSE"))
    printf("largest errors: %.2g by norm, %.2g by entry\n", worst_norm,
           worst_largest);
  tbr_model_free(m);
  tbr_sequences_free(&s);
  free(path), free(directory);
  return check_end();
}
