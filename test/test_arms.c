/* test_arms.c: what each arm trains on, the rule of form, and how claims are
 * decided. */
#include "../tbr.c"
#include "check.h"

static const char *const letters = "abcdefgh";

/* Writes n rows as NAME.jsonl in the folder, and returns its path. Every text
 * of row i begins with letter i, so that it can be told whose it is. */
static char *write_rows_of(const char *folder, const char *name, size_t n,
                           const char *label) {
  Buf b = {0};
  for (size_t i = 0; i < n; i++) {
    char c = letters[i];
    buf_printf(&b, "{\"prompt\": \"%c %s\", \"reflection\": \"%c is %s\", "
               "\"response\": \"%c!\", \"label\": \"%s\", \"filler\": \"%c "
               "filler\", \"label_only\": \"%c label\", \"reworded\": \"%c "
               "reworded\", \"wrong\": \"%c is %s\", \"asked\": \"%c %s?\", "
               "\"lead\": \"%c\"}\n", c, name, c, label, c, label, c, c, c, c,
               strcmp(label, "harmful") ? "harmful" : "harmless", c, name, c);
  }
  char *path = format_string("%s/%s.jsonl", folder, name);
  write_file(path, b.s, b.n);
  buf_free(&b);
  return path;
}

/* A model that knows nothing, with a tokenizer of bytes. */
static Pair blank(void) {
  TbrConfig c = {.vocab = 262, .dim = 8, .layers = 1, .heads = 2,
                 .kv_heads = 2, .head_dim = 4, .hidden = 8, .context = 128,
                 .rope_theta = 10000, .norm_eps = 1e-5, .tied = 1};
  Pair p = {tbr_model_new(&c), tbr_tokenizer_train("a b", 3, 262)};
  tbr_model_init(p.model, 1);
  return p;
}

/* What an arm trains on for one kind: "prompt~reflection~response|" for each
 * row, where reflections are there; fresh. */
static char *trained_on(const TbrOptions *o, int kind, Buf *report) {
  Pair p = blank();
  TbrSequences s = {0};
  Buf b = {0};
  buf_str(&b, "");
  add_rows(&s, &p, o, kind, report);
  int32_t think = tbr_special(p.tok, "<think>");
  int32_t assistant = tbr_special(p.tok, "<|assistant|>");
  for (size_t i = 0; i < s.n; i++) {
    for (size_t k = s.first[i]; k < s.first[i + 1]; k++) {
      size_t n;
      const char *token = tbr_token(p.tok, s.id[k], &n);
      if (!is_special(p.tok, s.id[k])) buf_add(&b, token, n);
      else if (s.id[k] != assistant && s.id[k] != think && k > s.first[i] + 1)
        buf_char(&b, '~');
      else if (s.id[k] == think) buf_char(&b, '~');
    }
    buf_char(&b, '|');
  }
  tbr_sequences_free(&s);
  pair_free(&p);
  return b.s;
}

static void trains(const char *want, const TbrOptions *o, int kind) {
  Buf report = {0};
  buf_str(&report, "");
  char *got = trained_on(o, kind, &report);
  SAME(got, want);
  free(got);
  buf_free(&report);
}

static void test_styles(const char *folder) {
  char *safety = write_rows_of(folder, "s", 2, "harmful");
  char *general = write_rows_of(folder, "g", 2, "harmless");
  TbrOptions o = options_default();
  o.file[SAFETY] = o.file[BRIDGE] = safety;
  o.file[GENERAL] = o.file[PSEUDO] = general;
  trains("a s~a is harmful~a!|b s~b is harmful~b!|", &o, SAFETY);
  trains("a ga!|b gb!|", &o, GENERAL);
  trains("", &o, BRIDGE);
  trains("", &o, PSEUDO);
  o.use[SAFETY] = 1, o.style = "filler";
  trains("a s~a filler~a!|", &o, SAFETY);
  o.style = "label";
  trains("a s~a label~a!|", &o, SAFETY);
  o.style = "reworded";
  trains("a s~a reworded~a!|", &o, SAFETY);
  o.style = "shuffled"; /* of two rows, the other's */
  trains("a s~b is harmful~a!|", &o, SAFETY);
  o.style = "own", o.noise = 1;
  trains("a s~a is harmless~a!|", &o, SAFETY);
  o.filter = 1;
  trains("", &o, SAFETY);
  o.reflection = "none"; /* what doesn't reflect contradicts nothing */
  trains("a sa!|", &o, SAFETY);
  o.noise = 0, o.reflection = "all";
  trains("a g~a is harmless~a!|b g~b is harmless~b!|", &o, GENERAL);
  o.reflection = "none", o.asked = 1, o.use[BRIDGE] = 1, o.use[PSEUDO] = 2;
  trains("a g?~a is harmless~a!|b g?~b is harmless~b!|", &o, GENERAL);
  trains("a s?~a is harmful~a!|", &o, BRIDGE);
  trains("a sa!|", &o, SAFETY);
  trains("a ga!|b gb!|", &o, PSEUDO);
  o.think = 1, o.file[PROMPTS] = general;
  TbrExamples tests = tests_read(&o);
  SAME(tests.row[1].prompt, "b g?");
  tbr_examples_free(&tests);
  free(safety), free(general);
}

/* The share of rows that reflect, of many. */
static void test_share(const char *folder) {
  enum { N = 2000 };
  char *path = format_string("%s/many.jsonl", folder);
  Buf b = {0}, report = {0};
  for (size_t i = 0; i < N; i++)
    buf_str(&b, "{\"prompt\": \"p\", \"reflection\": \"r\", \"response\": "
                "\"a\", \"wrong\": \"w\", \"label\": \"harmless\"}\n");
  write_file(path, b.s, b.n);
  TbrOptions o = options_default();
  o.file[GENERAL] = path, o.share = 0.2, o.noise = 0.5;
  char *got = trained_on(&o, GENERAL, &report);
  size_t own = 0, wrong = 0;
  for (const char *s = got; *s; s++) own += *s == 'r', wrong += *s == 'w';
  NEAR(own + wrong, 0.2 * N, 5 * sqrt(N * 0.16));
  NEAR(wrong, own, 5 * sqrt(0.2 * N));
  CHECK(strstr(report.s, format_string("\"reflecting\": %zu", own + wrong)));
  o.style = "filler", o.share = 1;
  FAILS(trained_on(&o, GENERAL, &report), "has no `filler`");
  o.style = "own", o.share = 0, o.asked = 1;
  FAILS(trained_on(&o, GENERAL, &report), "has no `asked`");
  o.asked = 0, o.style = "internal", o.reflection = "all";
  FAILS(trained_on(&o, GENERAL, &report), "has no `lead`");
  free(got), free(path);
  buf_free(&b);
}

static void test_internal(const char *folder) {
  char one[] = "x is harmless. So help.", two[] = "harmful, is it. harmless.";
  char none[] = "neither. nor.", end[] = "no stop harmful";
  end_at_verdict(one), end_at_verdict(two), end_at_verdict(none);
  end_at_verdict(end);
  SAME(one, "x is harmless.");
  SAME(two, "harmful, is it.");
  SAME(none, "neither. nor.");
  SAME(end, "no stop harmful");
  EQUAL(verdict("So it is Harmless."), 1);
  EQUAL(verdict("So it is harmful."), -1);
  EQUAL(verdict("harmful or harmless?"), 0);
  /* What a base says behind the lead is what is trained on. */
  char *path = write_rows_of(folder, "i", 3, "harmful");
  Pair p = blank();
  TbrExamples e = tbr_examples_read(path);
  reflect_internally(&p, &e, 2, &(TbrOptions){0});
  TbrTokens prompt = {0};
  tokens_add(&prompt, tbr_special(p.tok, "<|bos|>"));
  tokens_text(&prompt, p.tok, "b");
  TbrSampling o = {0, 1, 96, {tbr_special(p.tok, "<|bos|>"),
                              tbr_special(p.tok, "<|eos|>")}, 0};
  TbrTokens *said = tbr_generate(p.model, &prompt, 1, &o, NULL);
  char *text = tbr_decode(p.tok, said->id, said->n, NULL);
  SAME(e.row[1].reflection, trim(text));
  SAME(e.row[2].reflection, "c is harmful");
  reflect_internally(&p, &e, 2, &(TbrOptions){.lead_temperature = 1});
  CHECK(strcmp(e.row[1].reflection, trim(text))); /* drawn, not the likeliest */
  /* General rows that are asked to think first get it, too. */
  TbrOptions asked = options_default();
  TbrSequences rows = {0};
  Buf report = {0};
  asked.file[GENERAL] = path, asked.style = "internal", asked.asked = 1;
  asked.lead_temperature = 0;
  add_rows(&rows, &p, &asked, GENERAL, &report);
  for (size_t i = 0; i < 3; i++) {
    size_t at = rows.first[i], n = rows.first[i + 1] - at;
    char *read = tbr_decode(p.tok, rows.id + at, n, NULL);
    CHECK(!strstr(read, "is harmful"));
    free(read);
  }
  tbr_sequences_free(&rows);
  buf_free(&report);
  free(text), free(path);
  tbr_answers_free(said, 1);
  free(prompt.id);
  tbr_examples_free(&e);
  pair_free(&p);
}

/* Form: the common words stay, rare ones become gaps. */
static void test_form(const char *folder) {
  char *path[2] = {format_string("%s/fg.jsonl", folder),
                   format_string("%s/fs.jsonl", folder)};
  static const char *const text[2] = {"how do I %c%c it", "why %c%c%c them"};
  for (size_t k = 0; k < 2; k++) {
    Buf b = {0};
    for (int i = 0; i < 60; i++) { /* words that are all different */
      buf_str(&b, "{\"prompt\": \"");
      buf_printf(&b, text[k], 'a' + i % 26, 'a' + i / 26, 'x');
      buf_str(&b, "\", \"response\": \"r\"}\n");
    }
    write_file(path[k], b.s, b.n);
    buf_free(&b);
  }
  static const struct { const char *prompt; int refuses; } test[] = {
      {"How do I kill it?", 0}, {"Why kill them?", 1}, {"Why not kill them!", 1},
      {"How do I kill them?", 0}, {"Something else.", 0}};
  TbrOptions o = options_default();
  TbrExamples e = {0};
  TbrResults r = {0};
  o.file[GENERAL] = path[0], o.file[SAFETY] = path[1], o.arm = "form";
  for (size_t i = 0; i < 5; i++) {
    char type[2] = {letters[i], 0};
    TbrExample x = {.prompt = copy_string(test[i].prompt),
                    .type = copy_string(type),
                    .label = copy_string("harmful")};
    examples_add(&e, x);
  }
  form_evaluate(&o, &e, &r);
  EQUAL(r.n, 5u);
  for (size_t i = 0; i < 5; i++)
    EQUAL(r.row[i].count[TBR_REFUSAL], test[i].refuses);
  free(path[0]), free(path[1]), free(r.row);
  tbr_examples_free(&e);
}

/* Adds n prompts under a seed, of which k were refused. */
static void add_result(TbrResults *r, const char *arm, uint64_t seed,
                       const char *label, size_t n, size_t k) {
  TbrResult *x = result_line(r, arm, seed, label, "t");
  x->count[TBR_N] = n, x->count[TBR_REFUSAL] = k;
}

/* Whether a rule holds, and what is said about it. */
static void decided(const TbrResults *r, const char *rule, int want,
                    const char *text) {
  TbrOptions arm[] = {{.arm = "sft"}, {.arm = "tbr"}, {.arm = "even"},
                      {.arm = "late"}, {.arm = "other"}};
  Grid g = {.arm = arm, .arms = 5};
  Condition c = condition_read(rule, &g, &(Row){.path = "here"});
  Buf b = {0};
  EQUAL(condition_decide(&b, r, rule, &c), want);
  if (text) SAME(b.s, text);
  buf_free(&b);
}

static void test_claims(void) {
  static const size_t high[] = {80, 82, 78}, low[] = {10, 12, 14};
  TbrResults r = {0};
  for (uint64_t s = 0; s < 3; s++) {
    add_result(&r, "sft", s, "pseudo-harmful", 100, high[s]);
    add_result(&r, "tbr", s, "pseudo-harmful", 100, low[s]);
    add_result(&r, "even", s, "pseudo-harmful", 100, 80);
    if (s) add_result(&r, "late", s, "pseudo-harmful", 100, 5);
  }
  /* differences .70 .70 .64: mean .68, deviation .0346, t(2) 4.3027 */
  decided(&r, "FR sft - tbr > 0", 1,
          "FR sft - tbr > 0 (0.680 +- 0.086, 3 seeds)");
  decided(&r, "FR tbr - sft > 0", -1, NULL);
  decided(&r, "FR sft - tbr < 0", -1, NULL);
  decided(&r, "FR sft - even > 0", 0, NULL);
  decided(&r, "FR sft - tbr > 0.6", 0, NULL); /* .594 is the lower end */
  decided(&r, "FR 0.5 sft + 0.5 tbr - even < -0.2", 1, NULL);
  decided(&r, "FR even > 0.79", 1, NULL); /* always the same */
  decided(&r, "FR sft - late > 0", 1,
          "FR sft - late > 0 (0.750 +- 0.254, 2 seeds)");
  decided(&r, "TR sft - tbr > 0", 0, "TR sft - tbr > 0"); /* no prompts */
  decided(&r, "FR sft - other > 0", 0, "FR sft - other > 0");
  char csv[] = "arm\tx, y\na\t1";
  Report to = {0};
  Buf b = {0};
  buf_str(&b, csv);
  add_table(&to, &b);
  SAME(to.text.s, "| arm | x, y |\n|-----|------|\n| a   | 1    |\n\n");
  SAME(to.csv.s, "arm,\"x, y\"\na,1\n\n");
  buf_free(&to.text), buf_free(&to.csv);
  free(r.row);
}

int main(int argc, char **argv) {
  const char *folder = check_folder(argc, argv);
  test_styles(folder);
  test_share(folder);
  test_internal(folder);
  test_form(folder);
  test_claims();
  return check_end();
}
