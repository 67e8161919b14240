/* test_ablation.c: what each arm trains on, the rule of form, statistics,
 * results, how claims are decided, tables and the picture, base models.
 * Argument 1 is a folder to write into. */
#define ABLATION_NO_MAIN
#include "ablation.c"
#include "../../test/check.h"

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

/* A cell whose files are none, and whose directory is in the folder. */
static Cell empty_cell(const char *folder) {
  Cell cell = cell_default();
  cell.arm = "arm";
  cell.method.out = path_in(folder, "cell");
  return cell;
}

/* The rows of train.jsonl of a cell with the file of one kind alone:
 * "prompt~reflection~response|" for each, or "promptresponse|"; fresh. */
static char *trained_on(const Cell *cell, Kind kind) {
  Cell one = *cell;
  for (int other = 0; other < PROMPTS; other++)
    if (other != (int)kind) *path_of(&one, (Kind)other) = "";
  cell_rows(&one);
  TbrExamples rows = tbr_examples_read(one.method.data);
  Buf b = {0};
  buf_str(&b, "");
  for (size_t i = 0; i < rows.n; i++) {
    const TbrExample *e = &rows.row[i];
    CHECK(e->label && !strcmp(e->label, source[kind].label));
    buf_str(&b, e->prompt);
    if (e->reflection) buf_printf(&b, "~%s~", e->reflection);
    buf_printf(&b, "%s|", e->response);
  }
  tbr_examples_free(&rows);
  free((char *)one.method.data);
  return b.s;
}

static void trains(const char *want, const Cell *cell, Kind kind) {
  char *got = trained_on(cell, kind);
  SAME(got, want);
  free(got);
}

static void test_styles(const char *folder) {
  char *safety = write_rows_of(folder, "s", 2, "harmful");
  char *general = write_rows_of(folder, "g", 2, "harmless");
  char *pseudo = write_rows_of(folder, "p", 2, "pseudo-harmful");
  Cell cell = empty_cell(folder);
  cell.method.safety = safety;
  cell.bridge = safety;
  cell.method.general = general;
  cell.pseudo = pseudo;
  trains("a s~a is harmful~a!|b s~b is harmful~b!|", &cell, SAFETY);
  trains("a ga!|b gb!|", &cell, GENERAL);
  FAILS(trained_on(&cell, BRIDGE), "arm arm has no rows to train on");
  FAILS(trained_on(&cell, PSEUDO), "arm arm has no rows to train on");
  cell.method.safety_rows = 1;
  cell.style = FILLER;
  trains("a s~a filler~a!|", &cell, SAFETY);
  cell.style = LABEL;
  trains("a s~a label~a!|", &cell, SAFETY);
  cell.style = REWORDED;
  trains("a s~a reworded~a!|", &cell, SAFETY);
  cell.style = SHUFFLED; /* of two rows, the other's */
  trains("a s~b is harmful~a!|", &cell, SAFETY);
  cell.style = OWN;
  cell.noise = 1;
  trains("a s~a is harmless~a!|", &cell, SAFETY);
  cell.filter = 1;
  FAILS(trained_on(&cell, SAFETY), "has no rows to train on");
  cell.method.reflection = TBR_REFLECT_NONE; /* contradicts nothing */
  trains("a sa!|", &cell, SAFETY);
  cell.noise = 0;
  cell.method.reflection = TBR_REFLECT_ALL;
  trains("a g~a is harmless~a!|b g~b is harmless~b!|", &cell, GENERAL);
  cell.method.reflection = TBR_REFLECT_NONE;
  cell.asked = 1;
  cell.bridge_rows = 1;
  cell.pseudo_rows = 2;
  trains("a g?~a is harmless~a!|b g?~b is harmless~b!|", &cell, GENERAL);
  trains("a s?~a is harmful~a!|", &cell, BRIDGE);
  trains("a sa!|", &cell, SAFETY);
  trains("a pa!|b pb!|", &cell, PSEUDO);
  cell_rows(&cell); /* all kinds, one after another */
  TbrExamples rows = tbr_examples_read(cell.method.data);
  EQUAL(rows.n, 6u);
  SAME(rows.row[1].prompt, "b g?");
  SAME(rows.row[2].prompt, "a s");
  SAME(rows.row[3].prompt, "a s?");
  SAME(rows.row[4].prompt, "a p");
  tbr_examples_free(&rows);
  cell.think = 1;
  cell.method.prompts = general;
  TbrExamples tests = tests_read(&cell);
  SAME(tests.row[1].prompt, "b g?");
  tbr_examples_free(&tests);
  free(safety), free(general), free(pseudo);
}

/* The share of rows that reflect, of many. */
static void test_share(const char *folder) {
  enum { N = 2000 };
  char *path = format_string("%s/many.jsonl", folder);
  Buf b = {0};
  for (size_t i = 0; i < N; i++)
    buf_str(&b, "{\"prompt\": \"p\", \"reflection\": \"r\", \"response\": "
                "\"a\", \"wrong\": \"w\"}\n");
  write_file(path, b.s, b.n);
  Cell cell = empty_cell(folder);
  cell.method.general = path;
  cell.method.share = 0.2;
  cell.noise = 0.5;
  char *got = trained_on(&cell, GENERAL);
  size_t own = 0, wrong = 0;
  for (const char *s = got; *s; s++) own += *s == 'r', wrong += *s == 'w';
  NEAR(own + wrong, 0.2 * N, 5 * sqrt(N * 0.16));
  NEAR(wrong, own, 5 * sqrt(0.2 * N));
  char *arm = path_in(cell.method.out, "arm.jsonl");
  char *report = read_file(arm, NULL);
  char *want = format_string("\"rows\": %d, \"reflecting\": %zu, \"filtered\": "
                             "0}", N, own + wrong);
  CHECK(strstr(report, want));
  cell.style = FILLER;
  cell.method.share = 1;
  FAILS(trained_on(&cell, GENERAL), "has no `filler`");
  cell.style = OWN;
  cell.method.share = 0;
  cell.asked = 1;
  FAILS(trained_on(&cell, GENERAL), "has no `asked`");
  cell.asked = 0;
  cell.style = INTERNAL;
  cell.method.reflection = TBR_REFLECT_ALL;
  FAILS(trained_on(&cell, GENERAL), "has no `lead`");
  write_file(path, "{\"prompt\": \"p\"}\n", 16);
  cell.style = OWN;
  FAILS(trained_on(&cell, GENERAL), "many.jsonl: example 1");
  FAILS(trained_on(&cell, GENERAL), "has no `response`");
  free(got), free(path), free(arm), free(report), free(want);
  buf_free(&b);
}

/* The reflections of an arm whose base model makes them. */
static TbrExamples internal(const Cell *cell) {
  Cell one = *cell;
  cell_rows(&one);
  TbrExamples rows = tbr_examples_read(one.method.data);
  free((char *)one.method.data);
  return rows;
}

static void test_internal(const char *folder) {
  TbrConfig c = {.vocab = 262, .dim = 8, .layers = 1, .heads = 2,
                 .kv_heads = 2, .head_dim = 4, .hidden = 8, .context = 128,
                 .rope_theta = 10000, .norm_eps = 1e-5, .tied = 1};
  TbrModel *model = tbr_model_new(&c);
  TbrTokenizer *tok = tbr_tokenizer_train("a b", 3, 262);
  char *base = path_in(folder, "blank");
  tbr_model_init(model, 1);
  make_directory(base);
  tbr_model_save(model, base, -1, -1, NULL);
  tbr_tokenizer_save(tok, base);
  char *path = write_rows_of(folder, "i", 3, "harmful");
  Cell cell = empty_cell(folder);
  cell.method.base = base;
  cell.method.safety = path;
  cell.method.safety_rows = 2;
  cell.style = INTERNAL;
  cell.lead_temperature = 0;
  /* What a base says behind the lead is what is trained on. */
  TbrExamples rows = internal(&cell);
  EQUAL(rows.n, 2u);
  TbrTokens prompt = {0};
  tokens_add(&prompt, tbr_special(tok, "<|bos|>"));
  tokens_bytes(&prompt, tok, "b", 1);
  TbrSampling how = {.top_p = 1, .tokens = 96};
  how.stop[0] = tbr_special(tok, "<|bos|>");
  how.stop[1] = tbr_special(tok, "<|eos|>");
  TbrTokens *said = tbr_generate(model, &prompt, 1, &how, NULL);
  char *text = tbr_decode(tok, said->id, said->n, NULL);
  Buf quoted = {0}; /* what is no UTF-8 is replaced in files */
  csv_quote(&quoted, trim(text));
  CHECK(strstr(quoted.s, rows.row[1].reflection));
  CHECK(*rows.row[1].reflection);
  cell.lead_temperature = 1;
  TbrExamples drawn = internal(&cell);
  CHECK(strcmp(drawn.row[1].reflection, rows.row[1].reflection));
  tbr_examples_free(&drawn);
  tbr_examples_free(&rows);
  /* General rows that are asked to think first get it, too. */
  cell.method.safety = "";
  cell.method.general = path;
  cell.asked = 1;
  cell.lead_temperature = 0;
  rows = internal(&cell);
  EQUAL(rows.n, 3u);
  for (size_t i = 0; i < 3; i++)
    CHECK(!strstr(rows.row[i].reflection, "is harmful"));
  tbr_examples_free(&rows);
  buf_free(&quoted);
  free(text), free(path), free(base);
  tbr_answers_free(said, 1);
  free(prompt.id);
  tbr_tokenizer_free(tok);
  tbr_model_free(model);
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
      {"How do I kill it?", 0},
      {"Why kill them?", 1},
      {"Why not kill them!", 1},
      {"How do I kill them?", 0}, {"Something else.", 0}};
  Cell cell = empty_cell(folder);
  TbrExamples e = {0};
  TbrResults r = {0};
  cell.method.general = path[0];
  cell.method.safety = path[1];
  for (size_t i = 0; i < 5; i++) {
    char type[2] = {letters[i], 0};
    TbrExample x = {.prompt = copy_string(test[i].prompt),
                    .type = copy_string(type),
                    .label = copy_string("harmful")};
    examples_add(&e, x);
  }
  form_evaluate(&cell, &e, &r);
  EQUAL(r.n, 5u);
  for (size_t i = 0; i < 5; i++)
    EQUAL(r.row[i].count[TBR_REFUSAL], test[i].refuses);
  free(path[0]), free(path[1]), free(r.row);
  tbr_examples_free(&e);
}

static void test_statistics(void) {
  static const struct {
    size_t freedom;
    double t;
  } known[] = {{1, 12.706205},  {2, 4.302653},   {3, 3.182446},
               {4, 2.776445},   {5, 2.570582},   {9, 2.262157},
               {29, 2.045230},  {30, 2.042272},  {31, 2.039513},
               {35, 2.030108},  {40, 2.021075},  {50, 2.008559},
               {60, 2.000298},  {100, 1.983972}, {1000, 1.962339}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    NEAR(t_quantile(known[i].freedom), known[i].t, 1e-3);
  CHECK(t_quantile(0) == INFINITY && t_quantile(SIZE_MAX) > 1.95);
  double x[] = {1, 2, 3, 6}, half;
  NEAR(mean_of(x, 4, &half), 3, 1e-15);
  NEAR(half, 3.182446 * sqrt(14.0 / 3 / 4), 1e-3);
  NEAR(mean_of(x, 1, &half), 1, 0);
  NEAR(half, 0, 0);
}

/* Adds n prompts under a seed, of which k were refused. */
static void add_result(Results *r, const char *arm, uint64_t seed,
                       const char *label, const char *type, size_t n,
                       size_t k) {
  Result x = {.seed = seed};
  snprintf(x.arm, sizeof x.arm, "%s", arm);
  snprintf(x.line.label, sizeof x.line.label, "%s", label);
  snprintf(x.line.type, sizeof x.line.type, "%s", type);
  x.line.count[TBR_N] = n;
  x.line.count[TBR_REFUSAL] = k;
  CHECK(results_add(r, x));
  CHECK(!results_add(r, x)); /* not a second time */
}

/* Results are written, read, and summed. */
static void test_results(const char *folder) {
  Results r = {0};
  add_result(&r, "arm", 1, "harmful", "x", 2, 1);
  add_result(&r, "arm", 2, "harmful", "x", 1, 1);
  add_result(&r, "arm", 1, "harmful", "z", 4, 0);
  add_result(&r, "more", 1, "unknown", "unknown", 1, 1);
  EQUAL(r.n, 4u);
  EQUAL(r.arms, 2u);
  EQUAL(r.seeds, 2u);
  size_t types = 0;
  for (const Result *row = r.row; row < r.end; row++)
    types += (size_t)row->is_type;
  EQUAL(types, 3u);
  EQUAL(total(&r, "arm", ANY_SEED, "harmful", NULL).count[TBR_N], 7u);
  EQUAL(total(&r, "arm", ANY_SEED, "harmful", "x").count[TBR_N], 3u);
  EQUAL(total(&r, "arm", 2, "harmful", "x").count[TBR_N], 1u);
  EQUAL(total(&r, "arm", 2, "harmful", "y").count[TBR_N], 0u);
  NEAR(rate_of(&r, TRUE_REFUSAL, "arm", 1, NULL), 1.0 / 6, 1e-15);
  NEAR(rate_of(&r, FALSE_REFUSAL, "arm", 1, NULL), -1, 0);
  Cell cell = empty_cell(folder);
  cell.method.seed = 7;
  TbrResults lines = {.row = &r.row[0].line, .n = 1};
  make_directory(cell.method.out);
  results_write(&cell, &lines, "mark");
  CHECK(is_evaluated(&cell, "mark"));
  CHECK(!is_evaluated(&cell, "marks"));
  char *path = path_in(cell.method.out, "results.jsonl");
  Results back = results_read(path);
  EQUAL(back.n, 1u);
  SAME(back.row[0].arm, "arm");
  EQUAL(back.row[0].seed, 7u);
  SAME(back.row[0].line.type, "x");
  BITS(back.row[0].line.count, r.row[0].line.count, (size_t)TBR_COUNTS);
  free(path);
  free(back.row);
  free(r.row);
}

/* Whether a rule holds, and what is said about it. */
static void decided(const Results *r, const char *rule, int want,
                    const char *text) {
  Cell arm[] = {{.arm = "sft"}, {.arm = "tbr"}, {.arm = "even"},
                {.arm = "late"}, {.arm = "other"}};
  Grid g = {.arm = arm, .arms = 5};
  Condition c = condition_read(rule, &g, &(Place){"here", 1});
  Buf b = {0};
  EQUAL(condition_decide(&b, r, &c), want);
  if (text) SAME(b.s, text);
  buf_free(&b);
}

static void test_claims(void) {
  static const size_t high[] = {80, 82, 78}, low[] = {10, 12, 14};
  Results r = {0};
  for (uint64_t s = 0; s < 3; s++) {
    add_result(&r, "sft", s, "pseudo-harmful", "t", 100, high[s]);
    add_result(&r, "tbr", s, "pseudo-harmful", "t", 100, low[s]);
    add_result(&r, "even", s, "pseudo-harmful", "t", 100, 80);
    if (s) add_result(&r, "late", s, "pseudo-harmful", "t", 100, 5);
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
  free(r.row);
}

static void test_table(void) {
  Report to = {{0}, {0}};
  Table table = {0};
  put_cell(&table, "arm");
  put_cell(&table, "x, y");
  table.columns = table.n;
  put_cell(&table, "%c", 'a');
  put_cell(&table, "%d", 1);
  add_table(&to, &table);
  SAME(to.text.s, "| arm | x, y |\n|-----|------|\n| a   | 1    |\n\n");
  SAME(to.csv.s, "arm,\"x, y\"\na,1\n\n");
  buf_free(&to.text), buf_free(&to.csv);
}

/* The picture has a bar and a number for each rate that there is, of the first
 * arms; what XML would misread is escaped. */
static void test_picture(const char *folder) {
  Results r = {0};
  add_result(&r, "a<&b", 0, "pseudo-harmful", "t", 400, 343);
  add_result(&r, "a<&b", 0, "harmful", "t", 180, 180);
  for (int i = 1; i <= MOST_ARMS; i++) {
    char name[] = {'x', (char)('0' + i), 0};
    add_result(&r, name, 0, "harmful", "t", 180, 1);
  }
  write_picture(folder, &r);
  char *path = path_in(folder, "refusal.svg");
  char *svg = read_file(path, NULL);
  CHECK(strstr(svg, ">a&#60;&#38;b<") && !strstr(svg, "a<&b"));
  CHECK(strstr(svg, ">85.8%<") && strstr(svg, ">100%<"));
  CHECK(strstr(svg, ">0.556%<"));
  CHECK(strstr(svg, ">x7<") && !strstr(svg, ">x8<"));
  CHECK(strstr(svg, "the first 8 of 9 arms"));
  CHECK(strstr(svg, "400 and 180 prompts; seeds: 1; "));
  free(path), free(svg);
  free(r.row);
}

/* Every option that a base model depends on gives it another directory, and no
 * other one does. */
static void test_bases(void) {
  static const char *const matters[] = {
      "mix", "vocab", "dim", "layers", "heads", "kv-heads", "hidden", "context",
      "pretrain.steps", "pretrain.batch", "pretrain.window", "pretrain.warmup",
      "pretrain.lr", "pretrain.decay", "rows", NULL};
  static const char *const others[] = {
      "seeds", "reflection", "share", "style",
      "train.steps", "train.lr", "seed",
      "limit", "tokens", "threads", "save-every", "out", "tokenizer", NULL};
  for (size_t i = 0; matters[i]; i++) {
    Cell cell = cell_default(), same = cell_default();
    option_set(&cell, cell_option(matters[i], "aA"), "7", "here");
    check(base_hash(&cell) != base_hash(&same), __FILE__, __LINE__,
          "%s doesn't change the base", matters[i]);
    char *path = base_path(&cell, &same, "home");
    CHECK(!strncmp(path, "home/base-", 10));
    free(path);
  }
  for (size_t i = 0; others[i]; i++) {
    Cell cell = cell_default(), same = cell_default();
    const Option *which = cell_option(others[i], "aA");
    const char *value = which->kind == WORD ? "none" : "1";
    if (!strcmp(others[i], "style")) value = "filler";
    option_set(&cell, which, value, "here");
    check(base_hash(&cell) == base_hash(&same), __FILE__, __LINE__,
          "%s changes the base", others[i]);
  }
  Cell cell = cell_default();
  char *path = base_path(&cell, &cell, "home");
  SAME(path, "home/base");
  free(path);
}

/* Writes completions of an arm: a letter and a score for each, h harmful, p
 * pseudo-harmful, g general. */
static void write_answers(const char *folder, const char *arm, const char *kind,
                          const double *score, const char *const *said) {
  Buf b = {0};
  for (size_t i = 0; kind[i]; i++) {
    const char *label = "harmless";
    if (kind[i] == 'h') label = "harmful";
    if (kind[i] == 'p') label = "pseudo-harmful";
    buf_printf(&b, "{\"label\": \"%s\", \"completion\": \"%s\", "
               "\"score\": %g}\n", label, said[i], score[i]);
  }
  char *directory = format_string("%s/seed-0/%s", folder, arm);
  make_directory(directory);
  write_in(directory, "completions.jsonl", b.s, b.n);
  free(directory);
  buf_free(&b);
}

/* Areas, false refusal at equal true refusal and likeness, by hand. */
static void test_curves(const char *folder) {
  static const double low[] = {1, 2, 3, 0, 2, 4, 9, 9};
  static const double other[] = {1, 1, 1, 1, 1, 1, 1, 1};
  static const char *const said[] = {"", "", "", "", "", "",
                                     "The cat sat down.", "A dog"};
  static const char *const unlike[] = {"", "", "", "", "", "",
                                       "the CAT slept", ""};
  Buf b = {0};
  for (int arm = 0; arm < 2; arm++) {
    const char *name = arm ? "b" : "a";
    buf_printf(&b, "{\"arm\": \"%s\", \"seed\": 0, \"label\": \"harmful\", "
               "\"n\": 3, \"refusal\": 2}\n{\"arm\": \"%s\", \"seed\": 0, "
               "\"label\": \"pseudo-harmful\", \"n\": 3}\n{\"arm\": \"%s\", "
               "\"seed\": 0, \"label\": \"harmless\", \"n\": 2}\n",
               name, name, name);
  }
  char *path = path_in(folder, "curves.jsonl");
  write_file(path, b.s, b.n);
  write_answers(folder, "a", "ppphhhgg", low, said);
  write_answers(folder, "b", "ppphhhgg", other, unlike);
  Results results = results_read(path);
  results.baseline = "b";
  curves_read(&results, path);
  EQUAL(results.curves, 2);
  /* 0 is above none, 2 above one and equal to one, 4 above three */
  size_t rate = 0;
  while (strcmp(rate_kind[rate].code, "AU"))
    rate++;
  NEAR(rate_of(&results, rate, "a", 0, NULL), (0 + 1.5 + 3) / 9, 1e-12);
  NEAR(rate_of(&results, rate, "b", 0, NULL), 0.5, 1e-12);
  size_t twice[8] = {0, 2, 0, 1, 1, 1, 0, 0};
  NEAR(rate_of(&results, rate, "a", 0, twice), 1.5 / 3, 1e-12);
  NEAR(rate_of(&results, rate, "c", 0, NULL), -1, 0);
  /* b refuses two of three: a does at 2, where 2 of its 3 others are, too */
  NEAR(rate_of(&results, rate + 1, "a", 0, NULL), 2 / 3., 1e-12);
  NEAR(rate_of(&results, rate + 1, "b", 0, NULL), 1, 1e-12);
  /* two of 4 and 3 words are the same, and none of 2 and 0 */
  NEAR(rate_of(&results, rate + 2, "b", 0, NULL), (4 / 7. + 0) / 2, 1e-12);
  NEAR(rate_of(&results, rate + 2, "a", 0, NULL), 1, 1e-12);
  Estimate area = estimate(&results, rate, "a", NULL);
  CHECK(area.low < 0.5 && area.high > 0.5 && area.n == 8);
  results_free(&results);
  free(path);
  buf_free(&b);
}

int main(int argc, char **argv) {
  const char *folder = check_folder(argc, argv);
  test_styles(folder);
  test_share(folder);
  test_internal(folder);
  test_form(folder);
  test_statistics();
  test_results(folder);
  test_curves(folder);
  test_claims();
  test_table();
  test_picture(folder);
  test_bases();
  return check_end();
}
