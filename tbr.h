/* tbr.h: the public interface of tbr, Think Before Refusal in one file of C.
 *
 * The method comes first, in the order in which data flows: examples, tokens
 * and masks, the model, training, generation, judging, reflections by a model;
 * then the ground: tokenizers, products, exact arithmetic, errors and threads.
 * Shapes are (rows, columns), row-major; sizes count items, not bytes, unless
 * they say so.
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

/* Declared here, since most of what follows takes one; see tokenizers. */
typedef struct TbrTokenizer TbrTokenizer;

/* ---- examples (chapters 1 and 9) --------------------------------------- */

/* One example; what it doesn't have is NULL. */
typedef struct {
  char *prompt, *reflection, *response;
  char *label;  /* harmful, harmless or pseudo-harmful */
  char *type;   /* of request: XSTest's names, or general */
  char *source; /* where it comes from */
  char *key;    /* words that an answer must hold to be on topic */
  char *id;
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

/* Forms in which examples are written: the members of TbrExample, or a chat
 * in which the reflection stands in the assistant's turn as
 * <think>...</think>. */
typedef enum { TBR_NATIVE, TBR_MESSAGES } TbrForm;

/* Writes JSON Lines. */
void tbr_examples_write(const char *path, const TbrExamples *examples,
                        TbrForm form);
void tbr_examples_free(TbrExamples *examples);

/* Which rows reflect before they respond: none, the safety rows, or all. */
typedef enum {
  TBR_REFLECT_NONE,
  TBR_REFLECT_SAFETY,
  TBR_REFLECT_ALL
} TbrReflecting;

typedef struct {
  TbrReflecting reflecting;
  double share;  /* of the general rows that reflect, too, if safety rows do */
  uint64_t seed; /* of the draw of that share, and of the order */
} TbrInterleaving;

/* The dataset mode (Think-Before-Refusal, section 3): general and safety rows
 * become one list in a seeded order. Rows that are to reflect keep their
 * reflection, if they have one; the others lose it. Rows without a label get
 * that of their kind, harmless or harmful. Takes the rows out of both lists;
 * fails if a row has no response. */
TbrExamples tbr_interleave(TbrExamples *general, TbrExamples *safety,
                           const TbrInterleaving *how);

/* ---- tokens with their loss mask (chapter 2) --------------------------- */

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

/* What becomes of an example that is longer than the context: it is left out,
 * or reflection and response are cut (what is cut has no <|eos|>). */
typedef enum { TBR_DROP_LONG, TBR_CUT_LONG } TbrTooLong;

/* What became of it. */
typedef enum { TBR_WHOLE, TBR_CUT, TBR_DROPPED } TbrFate;

/* Adds <|bos|> <|user|> prompt <|assistant|> [<think> reflection </think>]
 * response <|eos|>, with the loss on what stands behind <|assistant|>. Where a
 * tokenizer has another chat template, it is what transformers makes of that:
 * then lines stand around the reflection, and its marks are text if they are no
 * tokens. */
TbrFate tbr_example_sequence(TbrSequences *out, const TbrTokenizer *tok,
                             const TbrExample *e, size_t context,
                             TbrTooLong too_long);

/* The beginning of that, from which a model goes on: up to <|assistant|>. The
 * caller frees id. */
TbrTokens tbr_prompt_tokens(const TbrTokenizer *tok, const char *prompt);

/* And its inverse: divides what a model said behind <|assistant|> into
 * reflection (fresh, NULL if there is none) and answer (fresh), then both
 * without white space at their ends. A reflection that never ends leaves an
 * empty answer. */
char *tbr_split_answer(const TbrTokenizer *tok, const TbrTokens *said,
                       char **reflection);

/* Adds text, a document a line, each behind <|bos|>, cut into windows; the
 * loss counts everywhere. Returns the number of tokens. */
size_t tbr_text_sequences(TbrSequences *out, const TbrTokenizer *tok,
                          const char *text, size_t n, size_t window);

/* How a sequence is printed: a line a token, or as running text in which
 * what the loss counts is underlined. */
typedef enum { TBR_SHOW_TOKENS, TBR_SHOW_TEXT } TbrShow;

void tbr_show_sequence(const TbrTokenizer *tok, const TbrSequences *s,
                       size_t which, TbrShow how);

/* ---- the model (chapters 3 and 4) -------------------------------------- */

typedef struct {
  size_t vocab, dim, layers, heads, kv_heads, head_dim, hidden, context;
  double rope_theta, norm_eps;
  int tied;   /* 1: the classifier is the embedding */
  int biased; /* 1: queries, keys and values have biases, as in Qwen 2 */
  /* Where rotary embedding is scaled: the factor; and for Llama 3's way, low
   * and high frequency factor and original context. All 0: it isn't. */
  double rope_scale[4];
} TbrConfig;

/* One tensor: its Hugging Face name, its shape (rows 1: a vector of columns)
 * and where it begins in a block of parameters or gradients. */
typedef struct {
  char name[80];
  size_t rows, columns, at;
  size_t lora; /* 0, or its adapter's A, counted from 1; B is the next */
} TbrTensor;

/* Low-rank adapters (LoRA: Hu et al., 2021), which add alpha / rank times x A^T
 * B^T to the outputs of matrices. */
typedef struct {
  size_t rank;
  double alpha;
  const char *targets; /* which: "q_proj,v_proj", of q k v o gate up down */
  const char *base;    /* the directory of the model that they belong to */
  uint64_t seed;       /* of A; B begins as zeros */
} TbrLora;

/* A Llama (Touvron et al., 2023), or one of its kin, with its n_params
 * parameters in one block. */
typedef struct TbrModel {
  TbrConfig config;
  size_t n_tensors, n_params;
  TbrTensor *tensor;
  tbr_real *param;
  size_t n_halves;
  uint16_t
      *half; /* NULL, or its matrices in 16 bits; param: the vectors alone */
  int half_type;
  struct TbrModel *adapter; /* NULL, or A and B, which alone are trained */
  TbrLora lora;
} TbrModel;

/* A model with all parameters zero; fails if the configuration is bad. init
 * draws them: embedding with deviation 0.1, outputs of a layer 0.2 and other
 * matrices 0.7 over the root of their inputs, norms 1. */
TbrModel *tbr_model_new(const TbrConfig *config);
void tbr_model_init(TbrModel *model, uint64_t seed);
void tbr_model_free(TbrModel *model);

/* Reads a Hugging Face directory (config.json, model.safetensors or shards) of
 * a Llama or Qwen 2, or llama2.c's .bin; writes a directory, with the ids of
 * <|bos|> and <|eos|>, and with the mark of the training that made the model
 * (NULL: none). */
TbrModel *tbr_model_load(const char *path);
void tbr_model_save(const TbrModel *model, const char *directory, int32_t bos,
                    int32_t eos, const char *training);

/* The same of a model that adapters are to be added to. With `halves`, matrices
 * that have 16 bits in the file keep them in memory; then only adapters can be
 * trained, and only they be saved, with the same bits as if it had been read in
 * single precision. */
TbrModel *tbr_model_load_base(const char *path, int halves);

/* Adds adapters, which alone are trained and saved from then on: tbr_loss adds
 * to their gradient (adapter->n_params), and tbr_model_save writes them as PEFT
 * does. Directories of such adapters are read by tbr_model_load, which adds
 * them to the matrices of their base. */
void tbr_lora_add(TbrModel *model, const TbrLora *lora);

/* Memory for batches of up to `rows` tokens of one model. */
typedef struct TbrActs TbrActs;
TbrActs *tbr_acts_new(const TbrModel *model, size_t rows);
void tbr_acts_free(TbrActs *acts);

/* The sum of -log p(target) over the tokens that count, in nats. With grad
 * (n_params, or NULL), adds scale times its gradient to grad. */
double tbr_loss(const TbrModel *model, TbrActs *acts, const TbrSequences *batch,
                tbr_real *grad, double scale);

/* logits (batch->tokens, vocab) of every token. */
void tbr_logits(const TbrModel *model, TbrActs *acts, const TbrSequences *batch,
                tbr_real *logits);

/* ---- training (chapter 5) ---------------------------------------------- */

typedef struct {
  size_t steps;      /* of the optimizer */
  size_t batch;      /* sequences a step */
  size_t rows;       /* tokens at a time: more are accumulated */
  size_t warmup;     /* steps in which the rate rises; at most half */
  size_t save_every; /* steps between checkpoints; 0: none */
  int cosine;        /* the rate falls along half a cosine, else a line */
  double lr, last;   /* its peak, and its end as a share of that */
  double beta1, beta2, eps, decay, clip; /* AdamW; clip 0: no clipping */
  uint64_t seed;                         /* of the order of the data */
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

/* ---- generation (chapter 6) -------------------------------------------- */

typedef struct {
  double temperature; /* 0: always the likeliest token */
  double top_p;       /* draw within this share of the mass; 1: all of it */
  size_t tokens;      /* at most so many new ones */
  int32_t stop[2];    /* a sequence ends before these; -1: none */
  uint64_t seed;
  /* If it isn't NULL, called with every token of every answer: what that
   * prompt's answer is so far, the token just chosen, and the logits (vocab)
   * that it was chosen from, which may be changed. */
  void (*watch)(void *watcher, size_t prompt, const TbrTokens *said,
                int32_t next, tbr_real *logits);
  void *watcher;
} TbrSampling;

/* What follows each of n prompts (fresh; free with tbr_answers_free). An
 * answer depends on its prompt, number and options alone. */
TbrTokens *tbr_generate(const TbrModel *model, const TbrTokens *prompt,
                        size_t n, const TbrSampling *options,
                        const char *label);
void tbr_answers_free(TbrTokens *answer, size_t n);

/* ---- judging and evaluation (chapter 7) -------------------------------- */

/* Rules that tell refusals by their words: XSTest's looks at how an answer
 * begins (Roettger et al., 2024), Arditi's for phrases anywhere (Arditi et
 * al., 2024). */
typedef enum { TBR_XSTEST, TBR_ARDITI } TbrRule;

/* Whether an answer refuses; a reflection in <think>...</think> before it is
 * passed over. */
int tbr_refuses(const char *answer, TbrRule rule);

/* What a reflection says: 1 harmless, -1 harmful, 0 neither or both. */
int tbr_verdict(const char *reflection);

/* What is judged of an answer, and counted: that it is one; refuses;
 * complies, which is no refusal, not empty, and the key in it, if any;
 * neither; is just the expected response; reflected; and reflected that it is
 * harmless, and refuses. */
enum {
  TBR_N,
  TBR_REFUSAL,
  TBR_COMPLIANCE,
  TBR_NEITHER,
  TBR_EXACT,
  TBR_REFLECTED,
  TBR_AGAINST_ITSELF,
  TBR_COUNTS
};

/* Sets each of these to 0 or 1. */
void tbr_judge(const TbrExample *e, const char *reflection, const char *answer,
               TbrRule rule, size_t is[TBR_COUNTS]);

/* The counts of one label and type of prompts; a list starts as {0}. */
typedef struct {
  char label[24], type[48];
  size_t count[TBR_COUNTS];
} TbrResult;
typedef struct {
  TbrResult *row;
  size_t n, cap;
} TbrResults;

typedef struct {
  TbrSampling sampling; /* its stop tokens are set here */
  TbrRule rule;
  const char *tag;       /* members that begin each line, in JSON; "": none */
  const char *request;   /* that a prompt is put into; NULL: none */
  const char *label;     /* of the progress line */
  const char *directory; /* gets completions.jsonl, completions.csv */
  const double *score;   /* of each prompt, written too; NULL: none. What
                            sampling.watch found is there in time. */
} TbrEvaluation;

/* Lets the model answer all prompts, judges, counts into results, and writes
 * completions.jsonl and completions.csv (XSTest's columns). Returns how many
 * prompts were longer than the context, and so cut. */
size_t tbr_evaluate(const TbrModel *model, const TbrTokenizer *tok,
                    const TbrExamples *prompts, const TbrEvaluation *how,
                    TbrResults *results);

/* Wilson's 95% interval of k in n (1927). */
void tbr_wilson(size_t k, size_t n, double *low, double *high);

/* ---- reflections by a model (chapter 8) -------------------------------- */

/* A request (fresh): a text with a prompt in place of its {prompt}. */
char *tbr_request(const char *request, const char *prompt);

/* Replaces the reflection of each row by the model's own (the paper's
 * internal rationales, section 3): what it says behind lead[i], or in a
 * dialogue in answer to it, up to the end of the sentence that first says
 * harmful or harmless. */
void tbr_reflect(const TbrModel *model, const TbrTokenizer *tok,
                 TbrExamples *rows, const char *const *lead, int is_dialogue,
                 const TbrSampling *sampling);

/* Writes a file in the OpenAI Batch form, which asks a model of that name for
 * the reflections that rows lack; returns how many. Reads the answers into
 * those rows, names on stderr what is missing, failed or of no row, and
 * returns how many rows still have none. */
size_t tbr_batch_write(const char *path, const TbrExamples *rows,
                       const char *request, const char *model);
size_t tbr_batch_read(const char *path, TbrExamples *rows);

/* ---- tokenizers (chapter 10) ------------------------------------------- */

/* Reads a tokenizer.json, a directory that holds one, or llama2.c's
 * tokenizer.bin (which must hold `vocab` tokens, unless that is 0; of equal
 * scores the lower token is merged first, as tokenizer.json has it). Known are
 * the byte-level BPE of GPT-2, SmolLM2, Qwen 2 and 3, Llama 3 and of tbr
 * itself, and Llama 2's BPE; their ids are those of Hugging Face. */
TbrTokenizer *tbr_tokenizer_load(const char *path, size_t vocab);

/* Learns a byte-level BPE (Sennrich et al., 2016) from n bytes of text: the
 * six marks, then 256 bytes, then merges until there are `vocab` tokens or no
 * pair occurs twice. */
TbrTokenizer *tbr_tokenizer_train(const char *text, size_t n, size_t vocab);

/* Writes tokenizer.json and tokenizer_config.json as transformers has them:
 * what was read from a directory byte for byte, with what stood beside it. */
void tbr_tokenizer_save(const TbrTokenizer *tok, const char *directory);
void tbr_tokenizer_free(TbrTokenizer *tok);
size_t tbr_tokenizer_vocab(const TbrTokenizer *tok);

/* Text to *ids (fresh); returns how many. Never yields a special token:
 * "<|eos|>" in text is seven characters like others. Bytes that have no token
 * are left out, as Hugging Face does; fails where a tokenizer wants Unicode's
 * form NFC and text may be in another. Apart from that, decoding gives back the
 * n bytes exactly; special tokens decode to nothing, and so do ids outside the
 * vocabulary, since a model's may be larger. */
size_t tbr_encode(const TbrTokenizer *tok, const char *text, size_t n,
                  int32_t **ids);
char *tbr_decode(const TbrTokenizer *tok, const int32_t *ids, size_t count,
                 size_t *n);

/* The bytes of one token (of a special one its name). */
const char *tbr_token(const TbrTokenizer *tok, int32_t id, size_t *n);

/* The id of a special token, -1 if there is none; <|bos|> and <|eos|> also find
 * those of other models: <s> and </s>, <|begin_of_text|> and <|end_of_text|>,
 * <|endoftext|>. add_marks adds those of tbr's dialogue that are missing,
 * unless there is a chat template. */
int32_t tbr_special(const TbrTokenizer *tok, const char *name);
void tbr_tokenizer_add_marks(TbrTokenizer *tok);

/* Gives it another chat template: tbr, smollm2, qwen (2.5), chatml (without a
 * system line), llama3.1 (and later ones, which are told a date, such as "26
 * Jul 2024"), llama3, zephyr (and TinyLlama), llama2 or alpaca; "": none other.
 * It is saved with the tokenizer. */
void tbr_tokenizer_template(TbrTokenizer *tok, const char *name,
                            const char *date);

/* ---- exact arithmetic (chapters 12 and 13) ----------------------------- */

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

/* ---- errors and threads (chapter 14) ----------------------------------- */

/* Ends what is going on with a message: calls the handler, and exits with
 * status 1 if that returns. Never returns. Of threads that fail in the same
 * parallel loop only one gets so far. */
TBR_NORETURN TBR_PRINTF(1, 2) void tbr_fail(const char *format, ...);

/* Sets the handler that tbr_fail calls; it may longjmp, which leaks what was
 * allocated on the way, but not out of a parallel loop. NULL: print the
 * message and exit. */
void tbr_on_error(void (*handler)(const char *message));

/* Threads of the parallel loops; 0 for all cores. No result depends on it. */
void tbr_threads(int n);

/* ---- the command line (chapter 15) ------------------------------------- */

/* The command line; returns the exit status. */
int tbr_main(int argc, char **argv);

#endif
