/* tbr.h: the public interface of tbr, Think Before Refusal in one C file. */
#ifndef TBR_H
#define TBR_H

#include <stddef.h>
#include <stdint.h>

#ifdef TBR_DOUBLE
typedef double tbr_real;
#else
typedef float tbr_real;
#endif

#if defined(__GNUC__) || defined(__clang__)
#define TBR_PRINTF(f, a) __attribute__((format(printf, f, a)))
#define TBR_NORETURN __attribute__((noreturn))
#else
#define TBR_PRINTF(f, a)
#define TBR_NORETURN
#endif

/* Ends what is going on with a message: removes half-written files, calls
 * the handler, and exits with status 1 if that returns. Never returns. */
TBR_NORETURN TBR_PRINTF(1, 2) void tbr_fail(const char *format, ...);

/* Sets the handler that tbr_fail calls; it may longjmp. NULL: print, exit. */
void tbr_on_error(void (*handler)(const char *message));

/* Threads of the parallel loops; 0 for all cores. No result depends on it. */
void tbr_threads(int n);

float tbr_soft_fmaf(float a, float b, float c);
double tbr_exp(double x);
double tbr_log(double x);
double tbr_sin(double x);
double tbr_cos(double x);
float tbr_expf(float x);
void tbr_gemm(size_t m, size_t n, size_t k, const tbr_real *a, int ta,
              const tbr_real *b, int tb, tbr_real *c);
uint64_t tbr_digest(uint64_t hash, const tbr_real *x, size_t n);

/* ---- tokenizers */
typedef struct TbrTokenizer TbrTokenizer;
TbrTokenizer *tbr_tokenizer_load(const char *path, size_t vocab_or_0);
TbrTokenizer *tbr_tokenizer_train(const char *text, size_t n, size_t vocab);
void tbr_tokenizer_save(const TbrTokenizer *tok, const char *directory);
size_t tbr_tokenizer_vocab(const TbrTokenizer *tok);
size_t tbr_encode(const TbrTokenizer *tok, const char *text, size_t n,
                  int32_t **ids);
char *tbr_decode(const TbrTokenizer *tok, const int32_t *ids, size_t count,
                 size_t *n);
const char *tbr_token(const TbrTokenizer *tok, int32_t id, size_t *n);
int tbr_token_special(const TbrTokenizer *tok, int32_t id);
int32_t tbr_special(const TbrTokenizer *tok, const char *name);
void tbr_tokenizer_add_special(TbrTokenizer *tok, const char *name);
void tbr_tokenizer_free(TbrTokenizer *tok);

/* For tbr.h. ---- Data ---- */

/* One example; what it doesn't have is NULL. */
typedef struct {
  char *prompt, *reflection, *response;
  char *label;      /* harmful, harmless or pseudo-harmful */
  char *type;       /* of request: XSTest's names, or general */
  char *source;     /* where it comes from */
  char *key;        /* words that an answer must hold to be on topic */
  char *id;
  char *filler;     /* controls: as long as a reflection, and says nothing */
  char *label_only; /* controls: the verdict of the reflection alone */
} TbrExample;

typedef struct {
  TbrExample *row;
  size_t n, cap;
} TbrExamples;

/* Reads a file of examples in any known form, told from its content:
 * JSON Lines or one JSON array, whose rows are native ({prompt, reflection,
 * response, label, type, source, key, id, filler, label_only}, all but the
 * first may be absent), Alpaca's {instruction, input, output}, {question,
 * response}, chats {messages}, or {prompt, completion} as texts or as lists
 * of turns; or CSV with a header that has `prompt`, as XSTest's. A response
 * that begins with <think>...</think> is divided into reflection and
 * response. A chat has one user turn, before it perhaps a system turn, which
 * becomes the beginning of the prompt, and after it perhaps one assistant
 * turn; more turns are an error, since nothing here trains on them. "-" is
 * standard input (JSON only). */
TbrExamples tbr_examples_read(const char *path);

/* Writes JSON Lines; form is "native", or "messages", where the reflection
 * stands in the assistant's turn as <think>...</think>. */
void tbr_examples_write(const char *path, const TbrExamples *examples,
                        const char *form);

/* Adds a copy. Starts with {0}. */
void tbr_examples_add(TbrExamples *examples, TbrExample copy_of);
void tbr_examples_free(TbrExamples *examples);

/* How much tbr_world_make draws; see there. */
typedef struct {
  size_t documents, general, safety, eval_pseudo, eval_harmful, eval_general;
} TbrWorldSizes;

/* ---- the model */
typedef struct {
  size_t vocab, dim, layers, heads, kv_heads, head_dim, hidden, context;
  double rope_theta, norm_eps;
  int tied; /* 1: the classifier is the embedding */
} TbrConfig;

/* One tensor: its Hugging Face name, its shape (rows 1: a vector of columns)
 * and where it begins in a block of parameters or gradients. */
typedef struct {
  char name[80];
  size_t rows, columns, at;
} TbrTensor;

typedef struct {
  TbrConfig config;
  size_t n_tensors, n_params;
  TbrTensor *tensor;
  tbr_real *param; /* n_params numbers */
} TbrModel;

/* A model with all parameters zero; fails if the configuration is bad. */
TbrModel *tbr_model_new(const TbrConfig *config);
void tbr_model_init(TbrModel *model, uint64_t seed);
void tbr_model_free(TbrModel *model);

/* Sequences one after another; target[i] is the token that should follow
 * id[i], or -1 where the loss doesn't count. Starts as {0}. */
typedef struct {
  size_t n, n_seq, n_targets; /* tokens, sequences, tokens that count */
  int32_t *id, *target;       /* n each */
  size_t *length;             /* of each sequence */
  size_t id_cap, target_cap, length_cap;
} TbrBatch;
void tbr_batch_add(TbrBatch *batch, const int32_t *id, const int32_t *target,
                   size_t n);
void tbr_batch_clear(TbrBatch *batch);
void tbr_batch_free(TbrBatch *batch);

typedef struct TbrActs TbrActs;
TbrActs *tbr_acts_new(const TbrModel *model, size_t rows);
void tbr_acts_free(TbrActs *acts);
double tbr_loss(const TbrModel *model, TbrActs *acts, const TbrBatch *batch,
                tbr_real *grad, double scale);
void tbr_logits(const TbrModel *model, TbrActs *acts, const TbrBatch *batch,
                tbr_real *logits);


/* ---- examples to tokens */
typedef struct {
  int32_t *id;
  size_t n, cap;
} TbrTokens;

typedef struct {
  size_t n, *first;
  int32_t *id, *target;
  size_t id_cap, target_cap, first_cap;
} TbrSequences;
void tbr_sequences_add(TbrSequences *s, const int32_t *id,
                       const int32_t *target, size_t n);
void tbr_sequences_free(TbrSequences *s);
void tbr_tokenizer_add_marks(TbrTokenizer *tok);
int tbr_example_sequence(TbrSequences *out, const TbrTokenizer *tok,
                         const TbrExample *e, int reflect, size_t context,
                         int cut_long);
size_t tbr_text_sequences(TbrSequences *out, const TbrTokenizer *tok,
                          const char *text, size_t n, size_t window);
void tbr_show_sequence(const TbrTokenizer *tok, const TbrSequences *s,
                       size_t which, int colour);

/* ---- training */
typedef struct {
  size_t steps, batch, rows, warmup, save_every;
  int cosine;
  double lr, last, beta1, beta2, eps, decay, clip;
  uint64_t seed;
} TbrTraining;
double tbr_train(TbrModel *model, const TbrTokenizer *tok,
                 const TbrSequences *s, const TbrTraining *options,
                 const char *directory, const char *label);

TbrModel *tbr_model_load(const char *path);
void tbr_model_save(const TbrModel *model, const char *directory, int32_t bos,
                    int32_t eos);

/* ---- generation */
typedef struct {
  double temperature, top_p;
  size_t tokens;
  int32_t stop[2];
  uint64_t seed;
} TbrSampling;
TbrTokens *tbr_generate(const TbrModel *m, const TbrTokens *prompt, size_t n,
                        const TbrSampling *options, const char *label);
void tbr_answers_free(TbrTokens *answer, size_t n);

/* ---- judging and evaluation */
typedef struct {
  int refusal, compliance, exact, reflected, against_itself;
} TbrJudgement;
typedef struct {
  char *reflection, *text;
  int cut;
} TbrAnswer;
enum {
  TBR_N, TBR_REFUSAL, TBR_COMPLIANCE, TBR_NEITHER, TBR_EXACT, TBR_REFLECTED,
  TBR_AGAINST_ITSELF, TBR_COUNTS
};
typedef struct {
  char arm[48], label[24], type[48];
  uint64_t seed;
  size_t count[TBR_COUNTS];
} TbrResult;
typedef struct {
  TbrResult *row;
  size_t n, cap;
} TbrResults;
int tbr_refuses(const char *answer, const char *rule);
TbrJudgement tbr_judge(const TbrExample *e, const char *reflection,
                       const char *answer, const char *rule);
void tbr_answer(const TbrModel *m, const TbrTokenizer *tok, TbrExamples *e,
                const TbrSampling *options, TbrAnswer *answer,
                const char *label);
void tbr_count(TbrResults *r, const char *arm, uint64_t seed,
               const TbrExample *e, const TbrJudgement *j);
size_t tbr_evaluate(const TbrModel *m, const TbrTokenizer *tok,
                    TbrExamples *e, const TbrSampling *options,
                    const char *rule, const char *arm, uint64_t seed,
                    const char *directory, TbrResults *results,
                    const char *label);

/* ---- options, grids, report */
typedef struct {
  const char *world, *out, *base, *model, *tokenizer, *general, *safety,
      *prompts, *text, *prompt, *in, *form, *rule, *reflection, *style,
      *too_long, *arm;
  size_t seed, seeds, vocab, dim, layers, heads, kv_heads, hidden, context;
  size_t pretrain_steps, pretrain_batch, pretrain_window, pretrain_warmup;
  size_t steps, batch, warmup, rows, save_every, general_rows, safety_rows;
  size_t limit, tokens, show;
  double pretrain_lr, pretrain_decay, lr, decay, share, temperature, top_p;
} TbrOptions;
void tbr_options_check(const TbrOptions *options);
TbrTraining tbr_training_of(const TbrOptions *options, int pretraining);
void tbr_make_tokenizer(const TbrOptions *options, const char *directory);
void tbr_pretrain(const TbrOptions *options, const char *directory);
void tbr_finetune(const TbrOptions *options, const char *directory);
void tbr_eval(const TbrOptions *options, const char *directory,
              TbrResults *results);
void tbr_ablate(const char *grid, const char *const *over,
                TbrResults *results);
void tbr_report(const TbrResults *results, const char *directory);
void tbr_wilson(size_t k, size_t n, double *low, double *high);
double tbr_t_quantile(size_t freedom);
double tbr_mean(const double *x, size_t n, double *half);
void tbr_world_make(const char *world_directory, uint64_t seed,
                    const TbrWorldSizes *sizes, const char *out_directory);

int tbr_main(int argc, char **argv);

#endif
