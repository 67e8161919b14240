/* Chapters 2 (masks), 5 and 6: what is trained on, that training can be cut
 * anywhere without a trace, and that generation is what forward says.
 * Argument: where to write. */
#include "../tbr.c"
#include "check.h"

enum { VOCAB = 61 };

static TbrModel *small_model(int tied, uint64_t seed) {
  TbrConfig c = {.vocab = VOCAB, .dim = 24, .layers = 2, .heads = 4,
                 .kv_heads = 2, .head_dim = 8, .hidden = 44, .context = 128,
                 .rope_theta = 10000, .norm_eps = 1e-5, .tied = tied};
  TbrModel *m = tbr_model_new(&c);
  tbr_model_init(m, seed);
  return m;
}

/* Sequences of 1 to 30 tokens, some of which don't count. */
static TbrSequences some_sequences(size_t n) {
  TbrSequences s = {0};
  Rng r = rng_stream(6, FOR_ORDER, 0);
  for (size_t i = 0; i < n; i++) {
    int32_t id[30], target[30];
    size_t len = 1 + rng_below(&r, 30);
    for (size_t j = 0; j < len; j++) {
      id[j] = (int32_t)rng_below(&r, VOCAB);
      target[j] = j + 1 < len && rng_below(&r, 3) == 0
                      ? -1 : (int32_t)((id[j] * 7 + (int32_t)i) % VOCAB);
    }
    tbr_sequences_add(&s, id, target, len);
  }
  return s;
}

static TbrTraining some_training(void) {
  TbrTraining t = {.steps = 9, .batch = 8, .rows = 1000, .warmup = 2,
                   .cosine = 1, .lr = 1e-2, .last = 0.1, .beta1 = 0.9,
                   .beta2 = 0.98, .eps = 1e-8, .decay = 0.1, .clip = 1,
                   .seed = 3};
  return t;
}

/* The weights after a training, in memory. */
static real *trained(int tied, const TbrTraining *t) {
  TbrModel *m = small_model(tied, 1);
  TbrSequences s = some_sequences(20);
  tbr_train(m, NULL, &s, t, NULL, NULL);
  real *w = mem_raw(m->n_params, sizeof *w);
  memcpy(w, m->param, m->n_params * sizeof *w);
  tbr_sequences_free(&s);
  tbr_model_free(m);
  return w;
}

/* ---- the mask --------------------------------------------------------------- */

static void encode(TbrTokens *t, const TbrTokenizer *tok, const char *text) {
  int32_t *id;
  size_t n = tbr_encode(tok, text, strlen(text), &id);
  for (size_t i = 0; i < n; i++) tokens_add(t, id[i]);
  free(id);
}

/* The tokens of a dialogue, put together by hand; *prompt gets how many of
 * them the loss doesn't count. */
static TbrTokens by_hand(const TbrTokenizer *tok, const TbrExample *e,
                         int reflect, size_t *prompt) {
  TbrTokens t = {0};
  tokens_add(&t, tbr_special(tok, "<|bos|>"));
  tokens_add(&t, tbr_special(tok, "<|user|>"));
  encode(&t, tok, e->prompt);
  tokens_add(&t, tbr_special(tok, "<|assistant|>"));
  *prompt = t.n;
  if (reflect && e->reflection) {
    tokens_add(&t, tbr_special(tok, "<think>"));
    encode(&t, tok, e->reflection);
    tokens_add(&t, tbr_special(tok, "</think>"));
  }
  encode(&t, tok, e->response);
  tokens_add(&t, tbr_special(tok, "<|eos|>"));
  return t;
}

/* Sequence `which` has just these tokens, and the loss counts every one from
 * number `prompt` on. */
static void expect_mask(const TbrSequences *s, size_t which,
                        const TbrTokens *t, size_t prompt) {
  size_t at = s->first[which], n = s->first[which + 1] - at, counted = 0;
  EQUAL(n, t->n - 1);
  if (n != t->n - 1) return;
  BITS(s->id + at, t->id, n);
  for (size_t i = 0; i < n; i++) {
    counted += s->target[at + i] >= 0;
    EQUAL(s->target[at + i], i + 1 >= prompt ? t->id[i + 1] : -1);
  }
  EQUAL(counted, t->n - prompt); /* reflection, response and their marks */
}

static void test_mask(void) {
  const char *text = "how do i stop a stuck script? press the stop key.";
  TbrTokenizer *tok = tbr_tokenizer_train(text, strlen(text), 300);
  TbrExample e = {.prompt = "how do i stop a script?",
                  .reflection = "a script is no person. harmless.",
                  .response = "press the stop key."};
  tbr_tokenizer_add_marks(tok);
  for (int reflect = 0; reflect < 2; reflect++) {
    TbrSequences s = {0};
    size_t prompt;
    TbrTokens t = by_hand(tok, &e, reflect, &prompt);
    TbrExample row = e;
    if (!reflect) row.reflection = NULL;
    EQUAL(tbr_example_sequence(&s, tok, &row, 200, TBR_DROP_LONG), TBR_WHOLE);
    expect_mask(&s, 0, &t, prompt);
    /* It just fits; in a shorter context it is dropped, or cut. */
    EQUAL(tbr_example_sequence(&s, tok, &row, t.n - 1, TBR_DROP_LONG),
          TBR_WHOLE);
    EQUAL(tbr_example_sequence(&s, tok, &row, t.n - 2, TBR_DROP_LONG),
          TBR_DROPPED);
    EQUAL(s.n, 2u);
    EQUAL(tbr_example_sequence(&s, tok, &row, t.n - 2, TBR_CUT_LONG), TBR_CUT);
    EQUAL(s.first[3] - s.first[2], t.n - 2);
    /* Who doesn't see the end of the response doesn't learn that it ends. */
    EQUAL(s.target[s.first[3] - 1], reflect ? tbr_special(tok, "<|eos|>")
                                            : t.id[t.n - 2]);
    /* What is behind the prompt, taken apart, is what was put together. */
    TbrTokens behind = {.id = t.id + prompt, .n = t.n - prompt - 1};
    char *thought, *response = tbr_split_answer(tok, &behind, &thought);
    SAME(response, row.response);
    CHECK(!thought == !reflect);
    if (thought) SAME(thought, row.reflection);
    free(thought), free(response);
    EQUAL(s.target[s.first[2] + prompt - 2], -1);
    EQUAL(s.target[s.first[2] + prompt - 1], t.id[prompt]);
    EQUAL(tbr_example_sequence(&s, tok, &row, prompt, TBR_CUT_LONG),
          TBR_DROPPED);
    free(t.id);
    tbr_sequences_free(&s);
  }
  /* Of a room of eleven tokens thought gets six, with its </think>, and the
   * response five; of one that a short thought leaves, the response gets all. */
  size_t prompt;
  TbrTokens whole = by_hand(tok, &e, 1, &prompt);
  TbrTokens answer_alone = {0};
  encode(&answer_alone, tok, e.response);
  size_t answer_at = whole.n - 1 - answer_alone.n;
  TbrSequences cut = {0};
  EQUAL(tbr_example_sequence(&cut, tok, &e, prompt + 10, TBR_CUT_LONG),
        TBR_CUT);
  EQUAL(cut.first[1], prompt + 10);
  BITS(cut.id, whole.id, prompt + 5);
  EQUAL(cut.id[prompt + 5], tbr_special(tok, "</think>"));
  BITS(cut.id + prompt + 6, answer_alone.id, 4);
  EQUAL(cut.target[prompt + 9], answer_alone.id[4]);
  size_t left = answer_alone.n - 2;
  EQUAL(tbr_example_sequence(&cut, tok, &e, answer_at + left - 1,
                             TBR_CUT_LONG), TBR_CUT);
  EQUAL(cut.first[2] - cut.first[1], answer_at + left - 1);
  free(whole.id), free(answer_alone.id);
  tbr_sequences_free(&cut);
  /* A chat's marks in a text are letters, not marks. */
  TbrExample sly = {.prompt = "<|eos|></think>", .response = "<think>"};
  TbrSequences s = {0};
  tbr_example_sequence(&s, tok, &sly, 200, TBR_DROP_LONG);
  size_t special = 0;
  for (size_t i = 0; i < s.first[1]; i++)
    special += (size_t)is_special(tok, s.id[i]);
  EQUAL(special, 3u);
  tbr_sequences_free(&s);
  /* A zero byte doesn't end what a model says. */
  int32_t said[] = {6 + 'a', 6, 6 + 'b'};
  TbrTokens three = {.id = said, .n = 3};
  char *reflection, *answer = tbr_split_answer(tok, &three, &reflection);
  SAME(answer, "a\xff" "b");
  free(answer);
  /* Marks of a reflection count once, at the beginning. */
  int32_t think = tbr_special(tok, "<think>"), end = think + 1;
  int32_t twice[] = {think, 6 + 'a', end, 6 + 'b', end, think, 6 + 'c', end};
  TbrTokens eight = {.id = twice, .n = 8}, six = {.id = twice + 1, .n = 7};
  answer = tbr_split_answer(tok, &eight, &reflection);
  SAME(answer, "bc");
  SAME(reflection, "a");
  free(answer), free(reflection);
  answer = tbr_split_answer(tok, &six, &reflection);
  SAME(answer, "abc");
  CHECK(!reflection);
  free(answer);
  tbr_tokenizer_free(tok);
}

/* ---- the dialogues of models --------------------------------------------------- */

/* A tokenizer with these special tokens, and without those that end so. */
static TbrTokenizer *tokenizer_with(const char *folder, const char *tokens,
                                    const char *missing) {
  TbrTokenizer *tok = tbr_tokenizer_train(" ", 1, MARKS + 256);
  for (size_t n; *tokens; tokens += n + (tokens[n] == ' ')) {
    n = strcspn(tokens, " ");
    token_add(tok, SPECIAL, tokens, n, "a test");
  }
  tbr_tokenizer_save(tok, folder);
  tbr_tokenizer_free(tok);
  char *path = path_in(folder, "tokenizer.json"), *json = read_file(path, NULL);
  for (char *at = json; (at = strstr(at, missing)); at++) *at = '_';
  write_file(path, json, strlen(json));
  tok = tbr_tokenizer_load(folder, 0);
  free(path), free(json);
  return tok;
}

/* What tokens are as text, in which special ones stand in brackets. */
static char *as_text(const TbrTokenizer *tok, const int32_t *id, size_t n) {
  Buf text = {0};
  buf_str(&text, "");
  for (size_t i = 0; i < n; i++) {
    size_t length;
    const char *bytes = tbr_token(tok, id[i], &length);
    if (is_special(tok, id[i])) buf_char(&text, '[');
    buf_add(&text, bytes, length);
    if (is_special(tok, id[i])) buf_char(&text, ']');
  }
  return text.s;
}

/* As transformers has it of each model's template (see templates.py); special
 * tokens of a prompt are not special here. Where the model begins is a ^. */
static const struct {
  const char *name, *tokens, *text;
} dialogues[] = {
    {"tbr", "", "[<|bos|>][<|user|>] a <|im_end|> [<|assistant|>]^<think>r"
                "</think>b[<|eos|>]"},
    {"smollm2", "<|im_start|> <|im_end|>",
     "[<|im_start|>]system\nYou are a helpful AI assistant named SmolLM, "
     "trained by Hugging Face[<|im_end|>]\n[<|im_start|>]user\n a <|im_end|> "
     "[<|im_end|>]\n[<|im_start|>]assistant\n^<think>\nr\n</think>\n\nb"
     "[<|im_end|>]\n"},
    {"qwen", "<|im_start|> <|im_end|>",
     "[<|im_start|>]system\nYou are Qwen, created by Alibaba Cloud. You are a "
     "helpful assistant.[<|im_end|>]\n[<|im_start|>]user\n a <|im_end|> "
     "[<|im_end|>]\n[<|im_start|>]assistant\n^<think>\nr\n</think>\n\nb"
     "[<|im_end|>]\n"},
    {"chatml", "<|im_start|> <|im_end|>",
     "[<|im_start|>]user\n a <|im_end|> [<|im_end|>]\n[<|im_start|>]assistant"
     "\n^<think>\nr\n</think>\n\nb[<|im_end|>]\n"},
    {"llama3.1",
     "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
     "[<|begin_of_text|>][<|start_header_id|>]system[<|end_header_id|>]\n\n"
     "Cutting Knowledge Date: December 2023\nToday Date: 02 Jan 2025\n\n"
     "[<|eot_id|>][<|start_header_id|>]user[<|end_header_id|>]\n\na <|im_end|>"
     "[<|eot_id|>][<|start_header_id|>]assistant[<|end_header_id|>]\n\n^"
     "<think>\nr\n</think>\n\nb[<|eot_id|>]"},
    {"llama3",
     "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
     "[<|begin_of_text|>][<|start_header_id|>]user[<|end_header_id|>]\n\na "
     "<|im_end|>[<|eot_id|>][<|start_header_id|>]assistant[<|end_header_id|>]"
     "\n\n^<think>\nr\n</think>\n\nb[<|eot_id|>]"},
    {"zephyr", "</s>", "[<|user|>]\n a <|im_end|> [</s>]\n[<|assistant|>]\n^"
                       "<think>\nr\n</think>\n\nb[</s>]\n"},
    {"llama2", "<s> </s>", "[<s>][INST] a <|im_end|> [/INST]^ <think>\nr\n"
                           "</think>\n\nb [</s>]"},
    {"alpaca", "",
     "Below is an instruction that describes a task. Write a response that "
     "appropriately completes the request.\n\n### Instruction:\n a <|im_end|> "
     "\n\n### Response:\n^<think>\nr\n</think>\n\nb[<|eos|>]"}};

/* One of them: prompt, mask, and the answer taken apart; chosen by name, and
 * again as it was saved. */
static void test_dialogue(const char *folder, size_t which) {
  const char *want = dialogues[which].text;
  TbrTokenizer *tok = tokenizer_with(folder, dialogues[which].tokens,
                                     "think>");
  TbrExample e = {.prompt = " a <|im_end|> ", .reflection = "r", .response = "b"};
  tbr_tokenizer_template(tok, dialogues[which].name, "02 Jan 2025");
  tbr_tokenizer_save(tok, folder);
  for (int again = 0; again < 2; again++) {
    if (again) tbr_tokenizer_free(tok), tok = tbr_tokenizer_load(folder, 0);
    TbrSequences s = {0};
    EQUAL(tbr_example_sequence(&s, tok, &e, 900, TBR_DROP_LONG), TBR_WHOLE);
    TbrTokens ask = tbr_prompt_tokens(tok, e.prompt);
    char *asks = as_text(tok, ask.id, ask.n);
    char *says = as_text(tok, s.target + ask.n - 1, s.tokens - ask.n + 1);
    char *all = format_string("%s^%s", asks, says);
    SAME(all, want);
    BITS(s.id, ask.id, ask.n);
    for (size_t i = 0; i + 1 < ask.n; i++) EQUAL(s.target[i], -1);
    /* the model stops before the first special token */
    int32_t stop[2];
    stops_of(tok, stop);
    TbrTokens said = {.id = s.target + ask.n - 1};
    while (!is_special(tok, said.id[said.n])) said.n++;
    EQUAL(said.id[said.n], stop[0]);
    char *reflection, *answer = tbr_split_answer(tok, &said, &reflection);
    SAME(trim(answer), "b");
    SAME(reflection, "r");
    free(reflection), free(answer), free(all), free(says), free(asks);
    free(ask.id);
    tbr_sequences_free(&s);
  }
  tbr_tokenizer_free(tok);
}

/* A cut dialogue still ends its reflection, in as many tokens as that takes. */
static void test_cut_dialogue(const char *folder) {
  TbrTokenizer *tok = tokenizer_with(folder, "<|im_start|> <|im_end|>",
                                     "think>");
  TbrExample e = {.prompt = "a", .reflection = "0123456789 0123456789 0123",
                  .response = "abcdefghijklmnopqrstuvwxyz 0123456789"};
  TbrSequences s = {0};
  tbr_tokenizer_template(tok, "chatml", "");
  TbrTokens ask = tbr_prompt_tokens(tok, e.prompt);
  EQUAL(tbr_example_sequence(&s, tok, &e, ask.n + 43, TBR_CUT_LONG), TBR_CUT);
  EQUAL(s.tokens, ask.n + 43);
  char *said = as_text(tok, s.target + ask.n - 1, s.tokens - ask.n + 1);
  SAME(said, "<think>\n012\n</think>\n\nabcdefghijklmnopqrstuv");
  EQUAL(tbr_example_sequence(&s, tok, &e, ask.n + 20, TBR_CUT_LONG),
        TBR_DROPPED);
  /* a prompt that is cut keeps what stands behind it */
  TbrModel model = {.config.context = ask.n + 9};
  TbrExample row = {.prompt = "0123456789 0123456789"};
  TbrExamples rows = {.row = &row, .n = 1};
  size_t cut;
  TbrTokens *prompt = prompts_of(&model, tok, &rows, NULL, &cut);
  char *asked = as_text(tok, prompt->id, prompt->n);
  EQUAL(cut, 1);
  SAME(asked, "[<|im_start|>]user\n012345678[<|im_end|>]\n[<|im_start|>]"
              "assistant\n");
  model.config.context = ask.n + 3;
  FAILS(prompts_of(&model, tok, &rows, NULL, &cut), "too short for a dialogue");
  free(said), free(asked), free(ask.id);
  tbr_answers_free(prompt, 1);
  tbr_sequences_free(&s);
  tbr_tokenizer_free(tok);
}

/* Writes a template beside a tokenizer; what is known of it is expected. */
static void expect_template(const char *folder, const char *file,
                            const char *text, const char *name) {
  char *path = path_in(folder, file);
  write_file(path, text, strlen(text));
  TbrTokenizer *tok = tbr_tokenizer_load(folder, 0);
  remove(path);
  SAME(template_of(tok)->name ? template_of(tok)->name : "none", name);
  if (!template_of(tok)->before) {
    int32_t *id;
    EQUAL(tbr_encode(tok, "<|im_end|>", 10, &id), 10);
    free(id);
    FAILS(tbr_prompt_tokens(tok, "a"), "--template says which");
  }
  free(path);
  tbr_tokenizer_free(tok);
}

static void test_templates(const char *folder) {
  for (size_t i = 0; i < sizeof dialogues / sizeof *dialogues; i++)
    test_dialogue(folder, i);
  test_cut_dialogue(folder);
  TbrTokenizer *tok = tokenizer_with(folder, "", "think>");
  const char *config = "tokenizer_config.json", *jinja = "chat_template.jinja";
  expect_template(folder, jinja, "'<|im_start|>' + message['role']", "chatml");
  expect_template(folder, jinja, "'<|im_start|>system\nYou are X.'", "");
  expect_template(folder, jinja, "{{ content }}", "none");
  expect_template(folder, jinja, "", "none");
  expect_template(folder, config, "{}", "tbr");
  expect_template(folder, config, "{\"chat_template\": \"<<SYS>>\"}", "llama2");
  expect_template(folder, config,
                  "{\"chat_template\": [{\"name\": \"rag\", \"template\": "
                  "\"<<SYS>>\"}, {\"name\": \"default\", \"template\": "
                  "\"<|start_header_id|>\"}]}", "llama3");
  FAILS(tbr_tokenizer_template(tok, "x", ""), "only tbr smollm2");
  tbr_tokenizer_template(tok, "smollm2", "");
  FAILS(tbr_prompt_tokens(tok, "a"), "no special token <|im_end|>");
  tbr_tokenizer_free(tok);
  tok = tokenizer_with(folder, "", "assistant|>");
  FAILS(tbr_prompt_tokens(tok, "a"), "no special token <|assistant|>");
  tbr_tokenizer_free(tok);
}

/* Windows of text: every token but the first is a target just once. */
static void test_windows(void) {
  const char *text = "one two three\n\nfour five six\nseven";
  TbrTokenizer *tok = tbr_tokenizer_train(text, strlen(text), 270);
  TbrSequences s = {0};
  size_t total = tbr_text_sequences(&s, tok, text, strlen(text), 7), bos = 0;
  EQUAL(s.first[s.n], total - 1);
  for (size_t i = 0; i < total - 1; i++) {
    if (i + 1 < total - 1) EQUAL(s.target[i], s.id[i + 1]);
    bos += s.id[i] == tbr_special(tok, "<|bos|>");
  }
  for (size_t i = 0; i + 1 < s.n; i++) EQUAL(s.first[i + 1] - s.first[i], 7u);
  EQUAL(bos, 3u); /* one for each document */
  tbr_sequences_free(&s);
  tbr_tokenizer_free(tok);
}

/* ---- one step of the optimizer ------------------------------------------------- */

static void test_schedule(void) {
  TbrTraining t = {.steps = 10, .warmup = 4, .last = 0.1};
  NEAR(schedule(&t, 0), 0.25, 1e-15);
  NEAR(schedule(&t, 3), 1, 1e-15);
  NEAR(schedule(&t, 4), 1, 1e-15);
  NEAR(schedule(&t, 7), 0.55, 1e-15);
  t.cosine = 1;
  NEAR(schedule(&t, 7), 0.55, 1e-15);
  NEAR(schedule(&t, 5), 0.1 + 0.45 * (1 + cos(3.141592653589793 / 6)), 1e-15);
  t.warmup = 10; /* half of the steps at most */
  NEAR(schedule(&t, 3), 0.8, 1e-15);
  NEAR(schedule(&t, 5), 1, 1e-15);
  t.steps = 1;
  NEAR(schedule(&t, 0), 1, 1e-15);
}

/* Three steps against AdamW written in double, one number at a time. */
static void test_adamw(void) {
  TbrModel *m = small_model(1, 2);
  size_t n = m->n_params;
  TbrTraining o = some_training();
  real *grad = mem_new(n, sizeof *grad);
  real *mean = mem_new(n, sizeof *mean), *square = mem_new(n, sizeof *square);
  Trainer t = {.model = m, .options = &o, .grad = grad,
               .state = {{"", m->param}, {"", mean}, {"", square}}};
  double *w = mem_new(n, sizeof *w), *a = mem_new(n, sizeof *a);
  double *b = mem_new(n, sizeof *b), worst = 0;
  Rng r = rng_stream(4, FOR_INIT, 0);
  for (size_t i = 0; i < n; i++) w[i] = (double)m->param[i];
  for (; t.step < 3; t.step++) {
    double count = (double)t.step + 1, lr = 0.01 * count, shrink = 0.5;
    for (size_t i = 0; i < n; i++)
      grad[i] = (real)(rng_normal(&r) * (i % 2 ? 1 : 1e-5));
    adamw(&t, lr, (real)shrink);
    for (size_t k = 0; k < m->n_tensors; k++) {
      const TbrTensor *x = &m->tensor[k];
      for (size_t i = x->at; i < x->at + x->rows * x->columns; i++) {
        double g = (double)grad[i] * shrink;
        a[i] = 0.9 * a[i] + 0.1 * g;
        b[i] = 0.98 * b[i] + 0.02 * g * g;
        if (x->rows > 1) w[i] -= lr * o.decay * w[i]; /* no vector decays */
        w[i] -= lr * (a[i] / (1 - pow(0.9, count))) /
                (sqrt(b[i] / (1 - pow(0.98, count))) + o.eps);
        worst = fmax(worst, fabs(w[i] - (double)m->param[i]));
      }
    }
  }
  AT_MOST(worst, 1e-6);
  free(grad), free(mean), free(square), free(w), free(a), free(b);
  tbr_model_free(m);
}

/* ---- what must not matter -------------------------------------------------------- */

static void test_parts_and_threads(void) {
  TbrTraining t = some_training();
  for (int tied = 0; tied < 2; tied++) {
    TbrModel *m = small_model(tied, 1);
    size_t n = m->n_params;
    t.rows = 1000;
    tbr_threads(1);
    real *whole = trained(tied, &t);
    for (int team = 2; team < 6; team += 3) {
      tbr_threads(team);
      real *other = trained(tied, &t);
      BITS(other, whole, n);
      free(other);
    }
    tbr_threads(0);
    t.rows = 33; /* gathered in parts of a sequence or two */
    real *parts = trained(tied, &t);
    if (tied) { /* the embedding's two gradients alternate: other rounding */
      double worst = 0;
      for (size_t i = 0; i < n; i++)
        worst = fmax(worst, fabs((double)(parts[i] - whole[i])));
      AT_MOST(worst, 1e-5);
    } else {
      BITS(parts, whole, n);
    }
    CHECK(memcmp(whole, m->param, n * sizeof *whole));
    free(whole), free(parts);
    tbr_model_free(m);
  }
}

/* Trains on into directory after `before` steps and a checkpoint there. */
static real *interrupted(const char *directory, const TbrTokenizer *tok,
                         const TbrTraining *o, size_t before) {
  TbrModel *m = small_model(1, 1);
  TbrSequences s = some_sequences(20);
  size_t n = m->n_params, tokens;
  Trainer t = trainer_start(m, &s, o, directory);
  real *w = mem_raw(n, sizeof *w);
  while (t.step < before) train_step(&t, &tokens);
  make_directory(directory);
  trainer_save(&t);
  tbr_model_init(m, 1); /* the process is killed; a new one starts */
  tbr_train(m, tok, &s, o, directory, "again");
  memcpy(w, m->param, n * sizeof *w);
  memset(m->param, 0, n * sizeof *w);
  tbr_model_init(m, 1);
  tbr_train(m, tok, &s, o, directory, "again"); /* it is done already */
  BITS(m->param, w, n);
  trainer_free(&t);
  tbr_sequences_free(&s);
  tbr_model_free(m);
  return w;
}

static char *log_of(const char *folder, const char *name) {
  char *path = format_string("%s/%s/log.csv", folder, name);
  char *text = read_file(path, NULL);
  free(path);
  return text;
}

static void test_resume(const char *folder) {
  TbrTokenizer *tok = tbr_tokenizer_train("a", 1, 262);
  TbrTraining t = some_training();
  TbrModel *m = small_model(1, 1);
  real *want = trained(1, &t);
  for (size_t before = 0; before < t.steps; before += 4) {
    char *name = format_string("resume-%zu", before);
    char *directory = path_in(folder, name);
    char *state = path_in(directory, "model.safetensors");
    remove(state);
    real *got = interrupted(directory, tok, &t, before);
    BITS(got, want, m->n_params);
    free(got), free(state), free(directory), free(name);
  }
  char *a = log_of(folder, "resume-0"), *b = log_of(folder, "resume-8");
  SAME(a, b);
  free(a), free(b);
  free(want);
  tbr_model_free(m);
  tbr_tokenizer_free(tok);
}

/* A model of another size lies in the directory of a finished training: that
 * is said, or trained anew, but never taken. Follows test_resume. */
static void test_other_size(const char *folder) {
  char *directory = path_in(folder, "resume-0");
  TbrTokenizer *tok = tbr_tokenizer_train("a", 1, 262);
  TbrTraining t = some_training();
  TbrModel *m = small_model(1, 1);
  TbrConfig c = m->config;
  c.hidden *= 40;
  TbrModel *large = tbr_model_new(&c);
  tbr_model_save(large, directory, 0, 1, NULL);
  TbrSequences s = some_sequences(20);
  real *want = trained(1, &t);
  check_said[0] = 0;
  tbr_on_error(check_caught);
  if (!setjmp(check_back)) tbr_train(m, tok, &s, &t, directory, "x");
  tbr_on_error(NULL);
  if (!check_said[0]) BITS(m->param, want, m->n_params);
  else CHECK(strstr(check_said, "resume-0"));
  tbr_sequences_free(&s);
  free(directory), free(want);
  tbr_model_free(large);
  tbr_model_free(m);
  tbr_tokenizer_free(tok);
}

/* ---- adapters, and frozen weights of 16 bits ------------------------------------ */

static const TbrLora some_lora = {.rank = 4, .alpha = 8, .seed = 5,
                                  .targets = "q_proj,v_proj,o_proj,up_proj",
                                  .base = "base"};

/* Trains adapters on into directory after `before` steps and a checkpoint. */
static real *adapted(const char *directory, const TbrTokenizer *tok,
                     const TbrTraining *o, size_t before) {
  TbrSequences s = some_sequences(20);
  real *w = NULL;
  for (int run = 0; run < 2; run++) { /* as two processes, and once more */
    TbrModel *m = small_model(1, 1);
    tbr_lora_add(m, &some_lora);
    size_t n = m->adapter->n_params, tokens;
    if (run == 0) {
      Trainer t = trainer_start(m, &s, o, directory);
      while (t.step < before) train_step(&t, &tokens);
      make_directory(directory);
      trainer_save(&t);
      trainer_free(&t);
    } else {
      TbrModel *other = small_model(1, 1);
      tbr_train(m, tok, &s, o, directory, "again");
      BITS(m->param, other->param, m->n_params); /* it is frozen */
      w = mem_raw(n, sizeof *w);
      memcpy(w, m->adapter->param, n * sizeof *w);
      memset(m->adapter->param, 0, n * sizeof *w);
      tbr_model_free(other);
      other = small_model(1, 1);
      tbr_lora_add(other, &some_lora);
      tbr_train(other, tok, &s, o, directory, "again"); /* it is done already */
      BITS(other->adapter->param, w, n);
      tbr_model_free(other);
    }
    tbr_model_free(m);
  }
  tbr_sequences_free(&s);
  return w;
}

static void test_adapter_resume(const char *folder) {
  TbrTokenizer *tok = tbr_tokenizer_train("a", 1, 262);
  TbrTraining t = some_training();
  real *want = NULL;
  TbrModel *m = small_model(1, 1);
  tbr_lora_add(m, &some_lora);
  for (size_t before = 0; before < t.steps; before += 4) {
    char *name = format_string("adapter-%zu", before);
    char *directory = path_in(folder, name);
    char *state = path_in(directory, "adapter_model.safetensors");
    remove(state);
    real *got = adapted(directory, tok, &t, before);
    if (want) BITS(got, want, m->adapter->n_params);
    free(want);
    want = got;
    free(state), free(directory), free(name);
  }
  free(want);
  tbr_model_free(m);
  tbr_tokenizer_free(tok);
}

/* Writes a model whose parameters are random numbers of 16 bits. */
static void write_halves(const TbrModel *m, const char *directory, StType type) {
  Rng r = rng_stream(9, FOR_INIT, type);
  Buf file = {0};
  size_t at = 0;
  buf_printf(&file, "%8s{", "");
  for (size_t i = 0; i < m->n_tensors; i++) {
    const TbrTensor *t = &m->tensor[i];
    buf_printf(&file, "%s\"%s\": {\"dtype\": \"%s\", \"shape\": [", i ? ", " : "",
               t->name, st_name[type]);
    if (t->rows > 1) buf_printf(&file, "%zu, ", t->rows);
    buf_printf(&file, "%zu], \"data_offsets\": [%zu, ", t->columns, at);
    at += 2 * t->rows * t->columns;
    buf_printf(&file, "%zu]}", at);
  }
  buf_char(&file, '}');
  put_little_endian(file.s, file.n - 8, 8);
  for (size_t i = 0; i < at / 2; i++) {
    size_t sign = rng_below(&r, 2) << 15, mantissa = rng_below(&r, 128);
    size_t bits = sign | (118 + rng_below(&r, 7)) << 7 | mantissa;
    if (type == F16) bits = sign | rng_below(&r, 14) << 10 | mantissa << 3;
    char two[2];
    put_little_endian(two, bits, 2);
    buf_add(&file, two, 2);
  }
  make_directory(directory);
  config_write(&m->config, directory, 0, 1);
  write_in(directory, "model.safetensors", file.s, file.n);
  buf_free(&file);
}

/* Frozen weights of 16 bits give the same bits as their copy in float32. */
static void test_halves(const char *folder, StType type, int tied) {
  char *directory = path_in(folder, "halves");
  TbrModel *shape = small_model(tied, 1);
  write_halves(shape, directory, type);
  TbrModel *m[2] = {tbr_model_load(directory), tbr_model_load_base(directory, 1)};
  TbrTraining o = some_training();
  TbrSequences s = some_sequences(20);
  int32_t id[] = {5, 3, 8};
  TbrTokens prompt = {.id = id, .n = 3}, *said[2];
  TbrSampling how = {.temperature = 1, .top_p = 1, .tokens = 30,
                     .stop = {-1, -1}};
  CHECK(!m[0]->half && m[1]->half);
  EQUAL(m[1]->n_params, shape->n_params);
  for (int i = 0; i < 2; i++) {
    tbr_lora_add(m[i], &some_lora);
    tbr_train(m[i], NULL, &s, &o, NULL, NULL);
    said[i] = tbr_generate(m[i], &prompt, 1, &how, NULL);
  }
  BITS(m[1]->adapter->param, m[0]->adapter->param, m[0]->adapter->n_params);
  EQUAL(said[0]->n, 30u);
  EQUAL(said[1]->n, 30u);
  BITS(said[1]->id, said[0]->id, 30);
  CHECK(tbr_training_bytes(m[1], 50) < tbr_training_bytes(m[0], 50));
  for (int i = 0; i < 2; i++) {
    tbr_answers_free(said[i], 1);
    tbr_model_free(m[i]);
  }
  tbr_sequences_free(&s);
  tbr_model_free(shape);
  free(directory);
}

/* Two models whose parameters are alike and whose heads are not are two
 * trainings. */
static void test_mark_tells_heads(void) {
  TbrModel *m = small_model(1, 1);
  TbrSequences s = some_sequences(3);
  TbrTraining o = some_training();
  Trainer a = {.model = m, .data = &s, .options = &o}, b = a;
  trainer_mark(&a);
  m->config.heads = 2, m->config.kv_heads = 1, m->config.head_dim = 16;
  trainer_mark(&b);
  CHECK(strcmp(a.mark, b.mark));
  tbr_sequences_free(&s);
  tbr_model_free(m);
}

/* Each epoch has every sequence once, in an order of its own. */
static void test_order(void) {
  enum { N = 50 };
  size_t epoch[3][N], seen[3][N] = {{0}};
  TbrSequences data = {.n = N};
  TbrTraining options = {.seed = 7};
  Trainer t = {.data = &data, .options = &options}, late = t;
  for (size_t i = 0; i < 3 * N; i++) {
    epoch[i / N][i % N] = draw_sequence(&t, i);
    seen[i / N][draw_sequence(&t, i)]++;
  }
  for (size_t i = 0; i < 3 * N; i++) EQUAL(seen[i / N][i % N], 1u);
  CHECK(memcmp(epoch[0], epoch[1], sizeof epoch[0]));
  CHECK(memcmp(epoch[1], epoch[2], sizeof epoch[0]));
  EQUAL(draw_sequence(&late, 2 * N + 3), epoch[2][3]); /* as after a resume */
  free(t.shuffled), free(late.shuffled);
}

static void train_badly(size_t steps, size_t batch, double lr) {
  TbrTraining t = some_training();
  TbrSequences s = some_sequences(2);
  TbrModel *m = small_model(1, 1);
  t.steps = steps, t.batch = batch, t.lr = lr;
  tbr_train(m, NULL, &s, &t, NULL, NULL);
}

static void test_bad_training(void) {
  TbrSequences none = {0}, dull = {0};
  TbrTraining t = some_training();
  TbrModel *m = small_model(1, 1);
  int32_t id = 1, target = -1;
  FAILS(tbr_train(m, NULL, &none, &t, NULL, NULL), "nothing to train on");
  tbr_sequences_add(&dull, &id, &target, 1);
  FAILS(tbr_train(m, NULL, &dull, &t, NULL, NULL), "nothing to learn");
  FAILS(train_badly(0, 1, 1e-3), "at least 1");
  FAILS(train_badly(1, 0, 1e-3), "at least 1");
  FAILS(train_badly(1, 1, 0), "above 0");
  FAILS(train_badly(9, 1, 1e30), "diverged");
  tbr_sequences_free(&dull);
  tbr_model_free(m);
}

/* ---- generation -------------------------------------------------------------------- */

/* Prompts of many lengths, with tokens that decide what is said. */
static TbrTokens *some_prompts(size_t n) {
  TbrTokens *p = mem_new(n, sizeof *p);
  Rng r = rng_stream(9, FOR_ORDER, 0);
  for (size_t i = 0; i < n; i++)
    for (size_t len = i % 40 == 7 ? 120 : 1 + rng_below(&r, 20); len--;)
      tokens_add(&p[i], (int32_t)rng_below(&r, VOCAB));
  return p;
}

static int same_tokens(const TbrTokens *a, const TbrTokens *b) {
  return a->n == b->n && (!a->n || !memcmp(a->id, b->id, a->n * sizeof *a->id));
}

/* A model whose answers aren't all alike. */
static TbrModel *talkative(void) {
  TbrModel *m = small_model(1, 4);
  for (size_t i = 0; i < m->n_params; i++) m->param[i] *= (real)1.7;
  return m;
}

static void test_generate(void) {
  enum { N = 3 * SLOTS + 5 };
  TbrModel *m = talkative();
  TbrTokens *p = some_prompts(N);
  TbrSampling greedy = {0, 1, 25, {3, 5}, 1}, draw = {0.9, 0.9, 25, {3, 5}, 1};
  TbrTokens *all = tbr_generate(m, p, N, &greedy, NULL), *alone;
  size_t stopped = 0, full = 0, wrong = 0;
  for (size_t i = 0; i < N; i++) {
    alone = tbr_generate(m, p + i, 1, &greedy, NULL);
    wrong += !same_tokens(alone, &all[i]);
    tbr_answers_free(alone, 1);
    for (size_t j = 0; j < all[i].n; j++)
      wrong += all[i].id[j] == 3 || all[i].id[j] == 5;
    stopped += all[i].n < 25 && p[i].n < 100;
    full += all[i].n == 25;
    if (p[i].n == 120) AT_MOST(all[i].n, 128 - 120 + 1); /* the context ends */
  }
  EQUAL(wrong, 0u);
  CHECK(stopped > 5 && full > 5);
  tbr_answers_free(all, N);
  /* A draw depends on the prompt's number, and not on those behind it. */
  all = tbr_generate(m, p, N, &draw, NULL);
  for (size_t n = 1; n < N; n += 61) {
    alone = tbr_generate(m, p, n, &draw, NULL);
    for (size_t i = 0; i < n; i++) wrong += !same_tokens(&alone[i], &all[i]);
    tbr_answers_free(alone, n);
  }
  for (size_t i = 0; i < 9; i++) p[i].n = 1; /* other ones before it */
  tbr_threads(3);
  alone = tbr_generate(m, p, N, &draw, NULL);
  for (size_t i = 9; i < N; i++) wrong += !same_tokens(&alone[i], &all[i]);
  tbr_threads(0);
  EQUAL(wrong, 0u);
  tbr_answers_free(alone, N);
  tbr_answers_free(all, N);
  TbrTokens empty = {0};
  FAILS(tbr_generate(m, &empty, 1, &draw, NULL), "prompt 1 has 0 tokens");
  TbrTokens alien = {&(int32_t){VOCAB}, 1, 1};
  FAILS(tbr_generate(m, &alien, 1, &draw, NULL), "outside the model's");
  tbr_answers_free(p, N);
  tbr_model_free(m);
}

/* What the cache gives is what the whole forward gives, to the bit. */
static void test_cache(void) {
  enum { N = 120, TWO = 2 };
  TbrModel *m = talkative();
  TbrTokens *p = some_prompts(8); /* number 7 has 120 tokens */
  const int32_t *id = p[7].id;
  int32_t target[N];
  for (size_t i = 0; i < N; i++) target[i] = -1;
  TbrSequences b = {0};
  tbr_sequences_add(&b, id, target, N);
  TbrActs *a = tbr_acts_new(m, N);
  real *z = mem_raw(N * VOCAB, sizeof *z);
  tbr_logits(m, a, &b, z);
  Decoder *d = decoder_new(m, TWO, N, N + 1);
  Span one = {0, 5, 0, 1};
  decoder_step(d, id, &(Batch){5, 1, &one}); /* slot 1 begins with five tokens */
  BITS(d->logits, z + 4 * VOCAB, VOCAB);
  for (size_t i = 5; i < 40; i++) {
    one = (Span){0, 1, i, 1};
    decoder_step(d, id + i, &(Batch){1, 1, &one});
    BITS(d->logits, z + i * VOCAB, VOCAB);
  }
  int32_t mixed[N];
  mixed[0] = id[40]; /* slot 1 goes on while slot 0 takes a long prompt */
  memcpy(mixed + 1, id, 110 * sizeof *id);
  Span both[TWO] = {{0, 1, 40, 1}, {1, 110, 0, 0}};
  decoder_step(d, mixed, &(Batch){111, TWO, both});
  BITS(d->logits, z + 40 * VOCAB, VOCAB);
  BITS(d->logits + VOCAB, z + 109 * VOCAB, VOCAB);
  decoder_free(d);
  free(z);
  tbr_acts_free(a);
  tbr_sequences_free(&b);
  tbr_answers_free(p, 8);
  tbr_model_free(m);
}

/* Draws follow softmax(z / temperature) within the top share. */
static void test_choose(void) {
  enum { N = 6, DRAWS = 40000 };
  const real z[N] = {(real)1, (real)3, (real)-2, (real)2.5, (real)3, (real)0};
  static const double temperature[] = {1, 0.5, 2}, top[] = {1, 0.7, 0.95};
  Rng r = rng_stream(1, FOR_SAMPLING, 0);
  for (size_t k = 0; k < 3; k++) {
    TbrSampling o = {temperature[k], top[k], 1, {-1, -1}, 0};
    double p[N], sum = 0, kept = 0, count[N] = {0};
    static const size_t order[N] = {1, 4, 3, 0, 5, 2}; /* likeliest first */
    for (size_t i = 0; i < N; i++)
      sum += p[i] = exp((double)z[i] / temperature[k]);
    for (size_t i = 0; i < N; i++) {
      size_t j = order[i];
      p[j] = kept < top[k] * sum ? p[j] : 0;
      kept += p[j];
    }
    for (size_t i = 0; i < DRAWS; i++) count[choose(z, N, &o, &r)]++;
    for (size_t i = 0; i < N; i++) {
      double q = p[i] / kept;
      NEAR(count[i], DRAWS * q, 5 * sqrt(DRAWS * q * (1 - q)));
    }
  }
  TbrSampling greedy = {0, 1, 1, {-1, -1}, 0}, narrow = {1, 0, 1, {-1, -1}, 0};
  EQUAL(choose(z, N, &greedy, &r), 1); /* of equals the first */
  EQUAL(choose(z, N, &narrow, &r), 1);
}

int main(int argc, char **argv) {
  const char *folder = check_folder(argc, argv);
  test_mask();
  test_templates(folder);
  test_windows();
  test_schedule();
  test_adamw();
  test_parts_and_threads();
  test_resume(folder);
  test_adapter_resume(folder);
  test_halves(folder, F16, 1);
  test_halves(folder, BF16, 0);
  test_mark_tells_heads();
  test_order();
  test_bad_training();
  test_generate();
  test_cache();
  test_choose();
  test_other_size(folder); /* last, since it once crashed */
  return check_end();
}
