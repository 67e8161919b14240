/* tbr.h: the public interface of tbr, Think Before Refusal in one file of C.
 *
 * In the order in which a newcomer meets it: errors and threads, exact
 * arithmetic, tokenizers, examples, the built-in world, sequences, the model,
 * training, generation, judging, experiments. Shapes are (rows, columns),
 * row-major; sizes count items, not bytes, unless they say so.
 *
 * No function returns an error: what goes wrong ends in tbr_fail. What a
 * function returns by pointer is the caller's, to be freed by the function
 * named beside it, or else by free.
 *
 * Compile tbr.c with -DTBR_NO_MAIN to link it into another program.
 */
#ifndef TBR_H
#define TBR_H

#include <stddef.h>
#include <stdint.h>

/* Numbers of the model. In double only to check gradients. */
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

/* ---- errors and threads (chapter 1) ------------------------------------ */

/* Ends what is going on with a message: calls the handler, and exits with
 * status 1 if that returns. Never returns. Of threads that fail in the same
 * parallel loop only one gets so far. */
TBR_NORETURN TBR_PRINTF(1, 2) void tbr_fail(const char *format, ...);

/* Sets the handler that tbr_fail calls; it may longjmp, which leaks what was
 * allocated on the way, but not out of a parallel loop (tbr_ablate has one
 * over its cells). NULL: print the message and exit. */
void tbr_on_error(void (*handler)(const char *message));

/* Threads of the parallel loops; 0 for all cores. No result depends on it. */
void tbr_threads(int n);

/* ---- exact arithmetic (chapters 2 and 3) ------------------------------- */

/* These give the same bits on every IEEE 754 platform.
 * soft_fmaf: a*b+c rounded once, without hardware for it (Boldo and
 * Melquiond, 2008). exp: |x| held within 700, log: of positive numbers, sin
 * and cos: |x| below 2^20; all within 5e-16 of the true value, relative (sin
 * and cos: absolute). expf: x held within [-87, 88], relative error below
 * 2e-7. */
float tbr_soft_fmaf(float a, float b, float c);
double tbr_exp(double x);
double tbr_log(double x);
double tbr_sin(double x);
double tbr_cos(double x);
float tbr_expf(float x);

/* C (m,n) += A (m,k) B (k,n); with ta, a holds A^T (k,m), with tb, b holds
 * B^T (n,k). Each element collects its products in ascending k, one fused
 * multiply-add each, starting from what is in c. */
void tbr_gemm(size_t m, size_t n, size_t k, const tbr_real *a, int ta,
              const tbr_real *b, int tb, tbr_real *c);

/* FNV-1a over the single-precision bits of n numbers, going on from hash (0:
 * from the start). */
uint64_t tbr_digest(uint64_t hash, const tbr_real *x, size_t n);

/* ---- tokenizers (chapter 5) -------------------------------------------- */

typedef struct TbrTokenizer TbrTokenizer;

/* Reads a tokenizer.json, a directory that holds one, or llama2.c's
 * tokenizer.bin (which must hold `vocab` tokens, unless that is 0; of equal
 * scores the lower token is merged first, as tokenizer.json has it). */
TbrTokenizer *tbr_tokenizer_load(const char *path, size_t vocab);

/* Learns a byte-level BPE (Sennrich et al., 2016) from n bytes of text: the
 * six marks, then 256 bytes, then merges until there are `vocab` tokens or no
 * pair occurs twice. */
TbrTokenizer *tbr_tokenizer_train(const char *text, size_t n, size_t vocab);

/* Writes tokenizer.json and tokenizer_config.json as transformers has them. */
void tbr_tokenizer_save(const TbrTokenizer *tok, const char *directory);
void tbr_tokenizer_free(TbrTokenizer *tok);
size_t tbr_tokenizer_vocab(const TbrTokenizer *tok);

/* Text to *ids (fresh); returns how many. Never yields a special token:
 * "<|eos|>" in text is seven characters like others. Decoding gives back the
 * n bytes exactly; special tokens decode to nothing, and so do ids outside the
 * vocabulary, since a model's may be larger. */
size_t tbr_encode(const TbrTokenizer *tok, const char *text, size_t n,
                  int32_t **ids);
char *tbr_decode(const TbrTokenizer *tok, const int32_t *ids, size_t count,
                 size_t *n);

/* The bytes of one token (of a special one its name). */
const char *tbr_token(const TbrTokenizer *tok, int32_t id, size_t *n);

/* The id of a special token, -1 if there is none; <|bos|> and <|eos|> also
 * find <s> and </s>. add_marks adds the marks of the dialogue that lack. */
int32_t tbr_special(const TbrTokenizer *tok, const char *name);
void tbr_tokenizer_add_marks(TbrTokenizer *tok);

/* ---- examples (chapter 6) ---------------------------------------------- */

/* One example; what it doesn't have is NULL. */
typedef struct {
  char *prompt, *reflection, *response;
  char *label;      /* harmful, harmless or pseudo-harmful */
  char *type;       /* of request: XSTest's names, or general */
  char *source;     /* where it comes from */
  char *key;        /* words that an answer must hold to be on topic */
  char *id;
  char *filler;     /* control: as long as a reflection, and says nothing */
  char *label_only; /* control: the verdict of the reflection alone */
  char *reworded;   /* the reflection in words that pretraining never used */
  char *wrong;      /* the reflection with the wrong verdict */
  char *asked;      /* the prompt with a request to think first */
  char *lead;       /* where a base model goes on with its own reflection */
} TbrExample;

/* A list of examples, which starts as {0}. */
typedef struct {
  TbrExample *row;
  size_t n, cap;
} TbrExamples;

/* Reads a file of examples in any known form, told from its content:
 * JSON Lines or one JSON array, whose rows are native (the members of
 * TbrExample, of which all but the first may be absent), Alpaca's
 * {instruction, input, output}, {question, response}, chats {messages}, or
 * {prompt, completion} as texts or as lists of turns; or CSV with a header
 * that has `prompt`, as XSTest's. A response that begins with
 * <think>...</think> is divided into reflection and response. A chat has one
 * user turn, before it perhaps a system turn, which becomes the beginning of
 * the prompt, and after it perhaps one assistant turn; more turns are an
 * error, since nothing here trains on them. "-" is standard input (JSON
 * only). */
TbrExamples tbr_examples_read(const char *path);

/* Writes JSON Lines; form is "native", or "messages", where the reflection
 * stands in the assistant's turn as <think>...</think>. */
void tbr_examples_write(const char *path, const TbrExamples *examples,
                        const char *form);
void tbr_examples_free(TbrExamples *examples);

/* How many documents, rows for fine-tuning and tests tbr_world_make draws. */
typedef struct {
  size_t documents, general, safety, pseudo, bridge;
  size_t eval_pseudo, eval_harmful, eval_general;
} TbrWorldSizes;

/* Expands lexicon.txt and templates.txt of world_directory under a seed, and
 * writes into out_directory pretrain.txt (a document a line), general.jsonl,
 * safety.jsonl and eval.jsonl; if the world has mixes for them ignorant.txt
 * (as many documents) and bridge.jsonl, and pseudo.jsonl, of items that no
 * test uses. What has no row is an empty file. Fails if anything of the
 * tests occurs where it must not. */
void tbr_world_make(const char *world_directory, uint64_t seed,
                    const TbrWorldSizes *sizes, const char *out_directory);

/* ---- sequences: tokens with their loss mask (chapter 6) ---------------- */

/* A list of tokens, which starts as {0}. */
typedef struct {
  int32_t *id;
  size_t n, cap;
} TbrTokens;

/* n sequences one after another, without padding; none sees another. Sequence
 * i is first[i] .. first[i+1]-1 of all tokens. target[j] is the token that
 * should follow id[j], or -1 where the loss doesn't count. Starts as {0}. */
typedef struct {
  size_t n, tokens, *first;
  int32_t *id, *target;
  size_t cap[3];
} TbrSequences;

void tbr_sequences_add(TbrSequences *s, const int32_t *id,
                       const int32_t *target, size_t n);
void tbr_sequences_free(TbrSequences *s);

/* Adds <|bos|> <|user|> prompt <|assistant|> [<think> reflection </think>]
 * response <|eos|>, with the loss on what stands behind <|assistant|>.
 * Returns 0 if it fits into the context; else 1 if reflection and response
 * were cut to fit (only with cut_long; a response that is cut has no <|eos|>),
 * 2 if it was left out. */
int tbr_example_sequence(TbrSequences *out, const TbrTokenizer *tok,
                         const TbrExample *e, int reflect, size_t context,
                         int cut_long);

/* Adds text, a document a line, each behind <|bos|>, cut into windows; the
 * loss counts everywhere. Returns the number of tokens. */
size_t tbr_text_sequences(TbrSequences *out, const TbrTokenizer *tok,
                          const char *text, size_t n, size_t window);

/* Prints one sequence: a line a token, or in colour as running text. */
void tbr_show_sequence(const TbrTokenizer *tok, const TbrSequences *s,
                       size_t which, int colour);

/* ---- the model (chapters 7 and 8) -------------------------------------- */

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

/* A Llama (Touvron et al., 2023) with its n_params parameters in one block. */
typedef struct {
  TbrConfig config;
  size_t n_tensors, n_params;
  TbrTensor *tensor;
  tbr_real *param;
} TbrModel;

/* A model with all parameters zero; fails if the configuration is bad. init
 * draws them: embedding with deviation 0.1, outputs of a layer 0.2 and other
 * matrices 0.7 over the root of their inputs, norms 1. */
TbrModel *tbr_model_new(const TbrConfig *config);
void tbr_model_init(TbrModel *model, uint64_t seed);
void tbr_model_free(TbrModel *model);

/* Reads a Hugging Face directory (config.json, model.safetensors), or
 * llama2.c's .bin; writes a directory, with the ids of <|bos|> and <|eos|>, and
 * with the mark of the training that made the model (NULL: none). */
TbrModel *tbr_model_load(const char *path);
void tbr_model_save(const TbrModel *model, const char *directory, int32_t bos,
                    int32_t eos, const char *training);

/* Memory for batches of up to `rows` tokens of one model. */
typedef struct TbrActs TbrActs;
TbrActs *tbr_acts_new(const TbrModel *model, size_t rows);
void tbr_acts_free(TbrActs *acts);

/* The sum of -log p(target) over the tokens that count, in nats. With grad
 * (n_params, or NULL), adds scale times its gradient to grad. */
double tbr_loss(const TbrModel *model, TbrActs *acts,
                const TbrSequences *batch, tbr_real *grad, double scale);

/* logits (batch->tokens, vocab) of every token. */
void tbr_logits(const TbrModel *model, TbrActs *acts,
                const TbrSequences *batch, tbr_real *logits);

/* ---- training (chapter 9) ---------------------------------------------- */

typedef struct {
  size_t steps;      /* of the optimizer */
  size_t batch;      /* sequences a step */
  size_t rows;       /* tokens at a time: more are accumulated */
  size_t warmup;     /* steps in which the rate rises; at most half */
  size_t save_every; /* steps between checkpoints; 0: none */
  int cosine;        /* the rate falls along half a cosine, else a line */
  double lr, last;   /* its peak, and its end as a share of that */
  double beta1, beta2, eps, decay, clip; /* AdamW; clip 0: no clipping */
  uint64_t seed;     /* of the order of the data */
} TbrTraining;

/* Trains with AdamW (Loshchilov and Hutter, 2019) on the mean loss of each
 * batch, and returns the last one. With a directory, a training that was
 * killed goes on from its last checkpoint with the same bits, one that is
 * done is not done again (and 0 returned), and the model, tokenizer and
 * log.csv are written there. label: of the progress line. */
double tbr_train(TbrModel *model, const TbrTokenizer *tok,
                 const TbrSequences *s, const TbrTraining *options,
                 const char *directory, const char *label);

/* The bytes of memory that tbr_train takes for `rows` tokens at a time. */
size_t tbr_training_bytes(const TbrModel *model, size_t rows);

/* ---- generation (chapter 10) ------------------------------------------- */

typedef struct {
  double temperature; /* 0: always the likeliest token */
  double top_p;       /* draw within this share of the mass; 1: all of it */
  size_t tokens;      /* at most so many new ones */
  int32_t stop[2];    /* a sequence ends before these; -1: none */
  uint64_t seed;
} TbrSampling;

/* What follows each of n prompts (fresh; free with tbr_answers_free). An
 * answer depends on its prompt, number and options alone. */
TbrTokens *tbr_generate(const TbrModel *model, const TbrTokens *prompt,
                        size_t n, const TbrSampling *options,
                        const char *label);
void tbr_answers_free(TbrTokens *answer, size_t n);

/* ---- judging and evaluation (chapter 11) ------------------------------- */

/* Whether an answer refuses; a reflection in <think>...</think> before it is
 * passed over. rule: "xstest" looks at how it begins (Roettger et al., 2024),
 * "arditi" for phrases anywhere (Arditi et al., 2024). */
int tbr_refuses(const char *answer, const char *rule);

/* What is judged of an answer, and counted for one arm, seed, label and type:
 * that it is one; refuses; complies, which is no refusal, not empty, and the
 * key in it, if any; neither; is just the expected response; reflected; and
 * reflected that it is harmless, and refuses. */
enum {
  TBR_N, TBR_REFUSAL, TBR_COMPLIANCE, TBR_NEITHER, TBR_EXACT, TBR_REFLECTED,
  TBR_AGAINST_ITSELF, TBR_COUNTS
};

/* Sets each of these to 0 or 1. */
void tbr_judge(const TbrExample *e, const char *reflection, const char *answer,
               const char *rule, size_t is[TBR_COUNTS]);

typedef struct {
  char arm[48], label[24], type[48];
  uint64_t seed;
  size_t count[TBR_COUNTS];
} TbrResult;
typedef struct {
  TbrResult *row;
  size_t n, cap;
} TbrResults;

/* Lets the model answer all prompts, judges, counts into results, and writes
 * completions.jsonl and completions.csv (XSTest's columns) into directory.
 * Returns how many prompts were longer than the context, and so cut. */
size_t tbr_evaluate(const TbrModel *model, const TbrTokenizer *tok,
                    const TbrExamples *e, const TbrSampling *options,
                    const char *rule, const char *arm, uint64_t seed,
                    const char *directory, TbrResults *results);

/* ---- experiments (chapter 12) ------------------------------------------ */

/* Everything that a command line or a grid file can say; `tbr help VERB` has
 * the meaning of each. Strings are never NULL; "" is none. */
typedef struct {
  const char *world, *out, *base, *model, *tokenizer, *text, *prompt, *in,
      *form, *rule, *reflection, *style, *too_long, *arm, *mix, *of, *by,
      *baseline, *grid;
  const char *argument;     /* of a verb that has one */
  const char *file[5];      /* general, safety, bridge, pseudo rows; prompts */
  size_t use[4];            /* how many rows of each */
  const char *const *given; /* the words of the command line, then NULL */
  TbrWorldSizes sizes;
  TbrConfig shape;             /* what options say of it, */
  TbrTraining pretrain, train; /* and of these */
  size_t seed, seeds, window, rows, save_every, filter, think, limit, tokens;
  size_t show, threads;
  double share, lead_temperature, asked, noise, temperature, top_p;
} TbrOptions;

/* The stages of an experiment, each from files to files in options->out. */
void tbr_make_tokenizer(const TbrOptions *options);
void tbr_pretrain(const TbrOptions *options);
void tbr_finetune(const TbrOptions *options);
void tbr_eval(const TbrOptions *options);

/* Runs every arm of the grid options->argument under every seed, and reports;
 * the options given take the place of what the grid says for all. */
void tbr_ablate(const TbrOptions *options);

/* Prints the tables of the results in options->argument, with the claims of
 * options->grid decided by their own rules, and writes report.md and
 * report.csv into options->out. */
void tbr_report(const TbrOptions *options);

/* Wilson's 95% interval of k in n (1927); the 97.5% quantile of Student's t;
 * the mean of n numbers with half of its 95% t-interval. */
void tbr_wilson(size_t k, size_t n, double *low, double *high);
double tbr_t_quantile(size_t freedom);
double tbr_mean(const double *x, size_t n, double *half);

/* The command line; returns the exit status. */
int tbr_main(int argc, char **argv);

#endif
