/* Chapters 3 and 4 in double precision (compile with -DTBR_DOUBLE): every
 * gradient against differences of the loss, and what a sequence may see. */
#include "../tbr.c"
#include "check.h"

enum { VOCAB = 17, LONGEST = 100 }; /* longer than one block of attention */

/* With three heads, it has biases, and scaled rotary embedding. */
static TbrModel *random_model(size_t heads, size_t kv_heads, int tied) {
  TbrConfig c = {.vocab = VOCAB, .dim = 8, .layers = 2, .heads = heads,
                 .kv_heads = kv_heads, .head_dim = 4, .hidden = 10,
                 .context = 120, .rope_theta = 50, .norm_eps = 1e-5,
                 .tied = tied, .biased = heads == 3,
                 .rope_scale = {heads == 3 ? 4 : 0, 1, 3, 60}};
  TbrModel *m = tbr_model_new(&c);
  Rng r = rng_stream(heads, FOR_INIT, kv_heads);
  tbr_model_init(m, 5);
  for (size_t i = 0; i < m->n_params; i++)
    m->param[i] = m->param[i] * 1.5 + 0.2 * rng_normal(&r);
  return m;
}

/* Adds a random sequence; share is that of the tokens that count. */
static void add_random(TbrSequences *b, size_t n, double share, Rng *r) {
  int32_t id[LONGEST], target[LONGEST];
  for (size_t i = 0; i < n; i++) {
    id[i] = (int32_t)rng_below(r, VOCAB);
    target[i] = rng_uniform(r) < share ? (int32_t)rng_below(r, VOCAB) : -1;
  }
  target[n - 1] = 3;
  tbr_sequences_add(b, id, target, n);
}

static TbrSequences random_batch(void) {
  static const size_t length[] = {1, 5, LONGEST, 2, 12};
  TbrSequences b = {0};
  Rng r = rng_stream(8, FOR_ORDER, 0);
  for (size_t i = 0; i < 5; i++) add_random(&b, length[i], 0.6, &r);
  return b;
}

/* The norm of the difference of a tensor's gradient from the central
 * difference of the loss, as a share of the latter's norm. */
static double tensor_error(TbrModel *m, TbrActs *a, const TbrSequences *b,
                           const TbrTensor *t, const real *grad) {
  const double h = 4e-6;
  real *param = m->adapter ? m->adapter->param : m->param;
  double difference = 0, size = 0;
  for (size_t i = t->at; i < t->at + t->rows * t->columns; i++) {
    real old = param[i];
    param[i] = old + h;
    double up = tbr_loss(m, a, b, NULL, 0);
    param[i] = old - h;
    double down = tbr_loss(m, a, b, NULL, 0);
    param[i] = old;
    double slope = (up - down) / (2 * h);
    difference += (slope - grad[i]) * (slope - grad[i]);
    size += slope * slope;
  }
  return sqrt(difference / size);
}

static void test_gradient(size_t heads, size_t kv_heads, int tied) {
  TbrModel *m = random_model(heads, kv_heads, tied);
  TbrSequences b = random_batch();
  TbrActs *a = tbr_acts_new(m, b.tokens + 3);
  real *grad = mem_new(m->n_params, sizeof *grad);
  real *half = mem_new(m->n_params, sizeof *half);
  double loss = tbr_loss(m, a, &b, grad, 1);
  NEAR(tbr_loss(m, a, &b, NULL, 0), loss, 0);
  for (size_t i = 0; i < m->n_tensors; i++) {
    double error = tensor_error(m, a, &b, &m->tensor[i], grad);
    if (!AT_MOST(error, 1e-6))
      printf("  %s, %zu heads, %zu key-value heads, %s\n", m->tensor[i].name,
             heads, kv_heads, tied ? "tied" : "not tied");
  }
  /* A gradient is added to what is there, times the scale. */
  double worst = 0, size = 0;
  tbr_loss(m, a, &b, half, 0.25);
  tbr_loss(m, a, &b, half, 0.25);
  for (size_t i = 0; i < m->n_params; i++) {
    worst = fmax(worst, fabs(half[i] - grad[i] / 2));
    size = fmax(size, fabs(grad[i]));
  }
  AT_MOST(worst / size, 1e-14);
  free(grad), free(half);
  tbr_acts_free(a);
  tbr_sequences_free(&b);
  tbr_model_free(m);
}

/* The gradients of adapters; merged, they give the same loss. */
static void test_adapters(size_t rank, const char *targets, size_t tensors) {
  TbrModel *m = random_model(4, 2, 1);
  TbrLora lora = {.rank = rank, .alpha = 5, .targets = targets, .base = "",
                  .seed = 3};
  TbrSequences b = random_batch();
  double plain, loss;
  TbrActs *a = tbr_acts_new(m, b.tokens);
  plain = tbr_loss(m, a, &b, NULL, 0);
  tbr_lora_add(m, &lora);
  TbrModel *adapter = m->adapter;
  EQUAL(adapter->n_tensors, tensors);
  NEAR(tbr_loss(m, a, &b, NULL, 0), plain, 0); /* B is 0 */
  Rng r = rng_stream(rank, FOR_INIT, 0);
  for (size_t i = 0; i < adapter->n_params; i++)
    adapter->param[i] += 0.3 * rng_normal(&r);
  real *grad = mem_new(adapter->n_params, sizeof *grad);
  loss = tbr_loss(m, a, &b, grad, 1);
  CHECK(fabs(loss - plain) > 1e-3);
  for (size_t i = 0; i < adapter->n_tensors; i++)
    if (!AT_MOST(tensor_error(m, a, &b, &adapter->tensor[i], grad), 1e-6))
      printf("  %s, rank %zu\n", adapter->tensor[i].name, rank);
  lora_merge(m);
  NEAR(tbr_loss(m, a, &b, NULL, 0), loss, 1e-11 * loss);
  free(grad);
  tbr_acts_free(a);
  tbr_sequences_free(&b);
  tbr_model_free(m);
}

/* -log softmax of z at target. */
static double surprise(const real *z, int32_t target) {
  double sum = 0;
  for (size_t j = 0; j < VOCAB; j++) sum += exp(z[j] - z[target]);
  return log(sum);
}

/* The loss is that of the logits, over just the targets that count. */
static void test_mask(void) {
  TbrModel *m = random_model(4, 2, 1);
  TbrSequences b = random_batch();
  TbrActs *a = tbr_acts_new(m, b.tokens);
  real *z = mem_raw(b.tokens * VOCAB, sizeof *z);
  double want = 0;
  tbr_logits(m, a, &b, z);
  for (size_t i = 0; i < b.tokens; i++)
    if (b.target[i] >= 0) want += surprise(z + i * VOCAB, b.target[i]);
  NEAR(tbr_loss(m, a, &b, NULL, 0), want, 1e-11 * want);
  for (size_t i = 0; i < b.tokens; i++) b.target[i] = -1;
  NEAR(tbr_loss(m, a, &b, NULL, 0), 0, 0);
  free(z);
  tbr_acts_free(a);
  tbr_sequences_free(&b);
  tbr_model_free(m);
}

/* No sequence sees its neighbour, and no token a later one. */
static void test_neighbours(void) {
  TbrModel *m = random_model(4, 2, 0);
  TbrSequences all = random_batch();
  TbrActs *a = tbr_acts_new(m, all.tokens);
  real *z = mem_raw(all.tokens * VOCAB, sizeof *z);
  real *alone = mem_raw(all.tokens * VOCAB, sizeof *z);
  double sum = 0, loss = tbr_loss(m, a, &all, NULL, 0);
  tbr_logits(m, a, &all, z);
  for (size_t s = 0; s < all.n; s++) {
    TbrSequences one = {0};
    size_t row = all.first[s], n = all.first[s + 1] - row;
    tbr_sequences_add(&one, all.id + row, all.target + row, n);
    sum += tbr_loss(m, a, &one, NULL, 0);
    tbr_logits(m, a, &one, alone);
    BITS(alone, z + row * VOCAB, n * VOCAB);
    tbr_sequences_free(&one);
  }
  NEAR(sum, loss, 1e-12 * loss);
  size_t changed = 1 + 5 + 50; /* a token amid the third sequence */
  all.id[changed] = (all.id[changed] + 1) % VOCAB;
  tbr_logits(m, a, &all, alone);
  BITS(alone, z, changed * VOCAB);
  CHECK(memcmp(alone + changed * VOCAB, z + changed * VOCAB, VOCAB));
  CHECK(memcmp(alone + (changed + 40) * VOCAB, z + (changed + 40) * VOCAB,
               VOCAB));
  BITS(alone + (1 + 5 + LONGEST) * VOCAB, z + (1 + 5 + LONGEST) * VOCAB,
       (2 + 12) * VOCAB);
  free(z), free(alone);
  tbr_acts_free(a);
  tbr_sequences_free(&all);
  tbr_model_free(m);
}

/* What doesn't fit is refused. */
static void test_bounds(void) {
  TbrModel *m = random_model(2, 1, 1);
  TbrSequences b = random_batch();
  TbrActs *a = tbr_acts_new(m, b.tokens - 1);
  FAILS(tbr_loss(m, a, &b, NULL, 0), "doesn't fit into 119 rows");
  tbr_acts_free(a);
  a = tbr_acts_new(m, b.tokens);
  b.id[4] = VOCAB;
  FAILS(tbr_loss(m, a, &b, NULL, 0), "token 17 is outside");
  b.id[4] = -1;
  FAILS(tbr_loss(m, a, &b, NULL, 0), "outside the model's vocabulary");
  b.id[4] = 0, b.target[4] = VOCAB;
  FAILS(tbr_loss(m, a, &b, NULL, 0), "outside the model's vocabulary");
  tbr_acts_free(a);
  tbr_sequences_free(&b);
  tbr_model_free(m);
}

static void bad_config(size_t heads, size_t kv_heads, size_t head_dim,
                       double eps, const char *words) {
  TbrConfig c = {.vocab = 5, .dim = 8, .layers = 1, .heads = heads,
                 .kv_heads = kv_heads, .head_dim = head_dim, .hidden = 8,
                 .context = 8, .rope_theta = 10, .norm_eps = eps};
  FAILS(tbr_model_new(&c), words);
}

int main(void) {
  tbr_threads(1); /* the model is too small to share out */
  test_gradient(4, 2, 1);
  test_gradient(4, 2, 0);
  test_gradient(3, 1, 1);
  test_gradient(2, 2, 0);
  test_adapters(3, "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                28);
  test_adapters(1, "up_proj,k_proj", 8);
  test_mask();
  test_neighbours();
  test_bounds();
  bad_config(1 << 16, 1 << 16, 1 << 16, 1e-5, "wider than");
  bad_config(0, 1, 4, 1e-5, "number of heads is 0");
  bad_config(3, 2, 4, 1e-5, "3 heads cannot share 2");
  bad_config(2, 2, 3, 1e-5, "needs it even");
  bad_config(2, 2, 4, 0, "epsilon");
  bad_config(2, (size_t)1 << 40, 4, 1e-5, "must be between");
  return check_end();
}
