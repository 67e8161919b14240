/* Chapters 1 and 9: examples in all forms, and their interleaving. Argument:
 * where to write. TBR_REAL names the folder of real data. */
#include "../tbr.c"
#include "check.h"

static const char *scratch;
#define SAYS(part, action) FAILS(action, part)

static char *file_named(const char *name, const char *text) {
  char *path = format_string("%s/%s", scratch, name);
  write_file(path, text, strlen(text));
  return path;
}

static TbrExamples read_text(const char *text) {
  char *path = file_named("examples", text);
  TbrExamples e = tbr_examples_read(path);
  free(path);
  return e;
}

static int same(const char *a, const char *b) {
  return a && b ? !strcmp(a, b) : a == b;
}

/* Checks the first example of a text. */
static void expect(const char *text, const char *prompt,
                   const char *reflection, const char *response,
                   const char *label) {
  TbrExamples e = read_text(text);
  int good = e.n && same(e.row[0].prompt, prompt) &&
             same(e.row[0].reflection, reflection) &&
             same(e.row[0].response, response) &&
             same(e.row[0].label, label);
  check(good, __FILE__, __LINE__, "read otherwise: %s", text);
  tbr_examples_free(&e);
}

static void test_readers(void) {
  expect("{\"prompt\": \"p\", \"reflection\": \"t\", \"response\": \"r\", "
         "\"label\": \"harmful\"}\n", "p", "t", "r", "harmful");
  expect("\n\n{\"prompt\": \"p\"}\r\n\n", "p", NULL, NULL, NULL);
  expect("\xef\xbb\xbf[{\"prompt\": \"p\", \"response\": null}]", "p", NULL,
         NULL, NULL);
  expect("[{\"instruction\": \"i\", \"input\": \"x\", \"output\": \"o\"}]",
         "i\nx", NULL, "o", NULL);
  expect("{\"prompt\": \"p\", \"instruction\": \"i\", \"input\": \"x\"}",
         "p", NULL, NULL, NULL);
  expect("{\"instruction\": \"i\", \"input\": \"\", \"output\": \"o\"}", "i",
         NULL, "o", NULL);
  expect("{\"question\": \"q\", \"response\": \"<think>\\nt\\n</think>\\n\\n"
         "a\"}", "q", "t", "a", NULL);
  expect("{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, "
         "{\"role\": \"user\", \"content\": \"u\"}, {\"role\": "
         "\"assistant\", \"content\": \"<think>t</think> a\"}]}", "s\n\nu",
         "t", "a", NULL);
  expect("{\"prompt\": [{\"role\": \"user\", \"content\": \"u\"}], "
         "\"completion\": [{\"role\": \"assistant\", \"content\": \"a\"}]}",
         "u", NULL, "a", NULL);
  expect("{\"prompt\": \"u\", \"completion\": \"a\", \"label\": \"safe\"}",
         "u", NULL, "a", "pseudo-harmful");
  expect("id,prompt,type,label,focus\n1,\"a, \"\"b\"\"\",homonyms,unsafe,x\n",
         "a, \"b\"", NULL, NULL, "harmful");
  expect("id,type,prompt,completion\n1,contrast_discr,p,c\n", "p", NULL, "c",
         "harmful");
  expect("prompt,type\np,homonyms\n", "p", NULL, NULL, "pseudo-harmful");
  expect("prompt,type\np,general\n", "p", NULL, NULL, NULL);
}

static void test_bad_examples(void) {
  SAYS("examples:2: row without `prompt`",
        read_text("{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n"));
  SAYS("examples:1: row without `prompt`", read_text("{\"prompt\": \"\"}"));
  SAYS("examples:2: \"response\" should be a string",
        read_text("[{\"prompt\": \"a\",\n\"response\": 3}]"));
  SAYS("without \\u0000", read_text("{\"prompt\": \"a\\u0000b\"}"));
  SAYS("row without `output`", read_text("{\"instruction\": \"a\"}"));
  SAYS("row without `response`", read_text("{\"question\": \"a\"}"));
  SAYS("examples:1: a turn should be",
        read_text("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"},"
                  "{\"role\": \"user\", \"content\": \"a\"}]}"));
  SAYS("a turn should be",
        read_text("{\"messages\": [{\"role\": \"user\"}]}"));
  SAYS("a turn should be", read_text("{\"messages\": [3]}"));
  SAYS("row without `prompt`", read_text("{\"messages\": \"x\"}"));
  SAYS("label \"bad\" should be",
        read_text("{\"prompt\": \"a\", \"label\": \"bad\"}"));
  SAYS("<think> should end with </think>",
        read_text("{\"prompt\": \"a\", \"response\": \"<think>b\"}"));
  SAYS("not stand beside a reflection",
        read_text("{\"prompt\": \"a\", \"reflection\": \"x\", "
                  "\"response\": \"<think>b</think>c\"}"));
  SAYS("examples:1: row without `prompt`; known are", read_text("[1]"));
  SAYS("no example", read_text("[]"));
  SAYS("no example", read_text("prompt,type\n"));
  SAYS("examples:2", read_text("type,label\na,safe\n"));
  SAYS("examples:2:1: a comma", read_text("{\"prompt\": \"a\"\n{}"));
  SAYS("examples", read_text(""));
  SAYS("cannot be opened", tbr_examples_read("/nowhere/at/all"));
}

static void test_round_trip(void) {
  TbrExamples a = {0};
  for (int i = 0; i < 3; i++) {
    TbrExample e = {0};
    e.prompt = copy_string("Say \"a\\b\",\n\xc3\xa9\x01");
    e.response = i ? copy_string("r") : NULL;
    e.reflection = i == 1 ? copy_string("two\nlines") : NULL;
    e.label = copy_string("harmless");
    e.id = copy_string("7");
    examples_add(&a, e);
  }
  char *path = format_string("%s/trip", scratch);
  static const TbrForm form[] = {TBR_NATIVE, TBR_MESSAGES};
  for (size_t k = 0; k < 2; k++) {
    tbr_examples_write(path, &a, form[k]);
    TbrExamples b = tbr_examples_read(path);
    CHECK(a.n == b.n);
    for (size_t i = 0; i < a.n; i++)
      for (size_t f = 0; f < EXAMPLE_MEMBERS; f++)
        CHECK(same(*example_at(&a.row[i], f), *example_at(&b.row[i], f)));
    tbr_examples_free(&b);
  }
  free(a.row[1].reflection);
  a.row[1].reflection = copy_string("x</think>y");
  SAYS("</think>", tbr_examples_write(path, &a, TBR_MESSAGES));
  free(path);
  tbr_examples_free(&a);
}

/* A list of n rows whose prompts begin with `first`, then the next letters. */
static TbrExamples rows_from(char first, size_t n) {
  TbrExamples rows = {0};
  for (size_t i = 0; i < n; i++) {
    char *prompt = format_string("%c", first + (int)i);
    TbrExample e = {.prompt = prompt, .reflection = copy_string("r"),
                    .response = copy_string("a")};
    examples_add(&rows, e);
  }
  return rows;
}

/* The prompts of a dataset, in capitals where the row reflects; fresh. */
static char *made_of(size_t general, size_t safety, TbrInterleaving how) {
  TbrExamples g = rows_from('a', general), s = rows_from('n', safety);
  TbrExamples rows = tbr_interleave(&g, &s, &how);
  Buf b = {0};
  buf_str(&b, "");
  CHECK(!g.n && !s.n && !g.row && !s.row);
  EQUAL(rows.n, general + safety);
  for (size_t i = 0; i < rows.n; i++) {
    const TbrExample *e = &rows.row[i];
    char letter = *e->prompt;
    SAME(e->label, letter < 'n' ? "harmless" : "harmful");
    buf_char(&b, e->reflection ? letter - 'a' + 'A' : letter);
  }
  tbr_examples_free(&rows);
  return b.s;
}

/* The letters of a text in their order. */
static char *in_order(char *s) {
  for (size_t i = 0; s[i]; i++)
    for (size_t j = i; j && (s[j] | 32) < (s[j - 1] | 32); j--) {
      char t = s[j];
      s[j] = s[j - 1];
      s[j - 1] = t;
    }
  return s;
}

static void test_interleaving(void) {
  TbrInterleaving how = {.reflecting = TBR_REFLECT_SAFETY, .seed = 3};
  char *first = made_of(6, 5, how), *again = made_of(6, 5, how);
  SAME(first, again);
  CHECK(strcmp(first, "abcdefNOPQR")); /* the order is a random one */
  SAME(in_order(first), "abcdefNOPQR");
  how.seed = 4;
  char *other = made_of(6, 5, how);
  CHECK(strcmp(other, again));
  how.reflecting = TBR_REFLECT_NONE, how.share = 1;
  SAME(in_order(made_of(4, 3, how)), "abcdnop");
  how.reflecting = TBR_REFLECT_ALL, how.share = 0;
  SAME(in_order(made_of(4, 3, how)), "ABCDNOP");
  SAME(in_order(made_of(0, 3, how)), "NOP");
  how.reflecting = TBR_REFLECT_SAFETY, how.share = 1;
  SAME(in_order(made_of(4, 3, how)), "ABCDNOP");
  how.share = 0.3;
  size_t reflecting = 0, all = 0;
  for (how.seed = 0; how.seed < 200; how.seed++) {
    char *rows = made_of(10, 2, how);
    for (const char *c = rows; *c; c++) reflecting += *c < 'N', all++;
    free(rows);
  }
  NEAR(reflecting, 0.3 * 2000, 5 * sqrt(2000 * 0.21));
  free(first), free(again), free(other);
  TbrExamples bad = rows_from('a', 2), none = {0};
  bad.row[1].response = NULL;
  FAILS(tbr_interleave(&bad, &none, &how), "example 2 of the harmless ones");
  /* A label that is there stays, and a row without reflection stays without. */
  TbrExamples own = read_text("{\"prompt\": \"p\", \"response\": \"r\", "
                              "\"label\": \"pseudo-harmful\"}");
  TbrExamples rows = tbr_interleave(&own, &none, &how);
  SAME(rows.row[0].label, "pseudo-harmful");
  CHECK(!rows.row[0].reflection);
  tbr_examples_free(&rows);
}

/* The first rows, and some that are evenly spaced. */
static void test_limits(void) {
  TbrExamples rows = rows_from('a', 9);
  examples_first(&rows, 0);
  examples_spread(&rows, 0);
  EQUAL(rows.n, 9);
  examples_first(&rows, 8);
  SAME(rows.row[7].prompt, "h");
  examples_spread(&rows, 4);
  EQUAL(rows.n, 4);
  SAME(rows.row[0].prompt, "a");
  SAME(rows.row[3].prompt, "g");
  tbr_examples_free(&rows);
}

static void test_real(const char *directory) {
  static const struct { const char *name; size_t n; } file[] = {
      {"STAR-1.json", 1000}, {"alpaca_en_demo.json", 999},
      {"safety_only_data_Instructions.json", 2483},
      {"xstest_prompts.csv", 450},
      {"xstest_v2_completions_gpt4_streval.csv", 450},
      {"xstest_v2_completions_mistralinstruct_streval.csv", 450}};
  for (size_t i = 0; i < sizeof file / sizeof *file; i++) {
    char *path = format_string("%s/%s", directory, file[i].name);
    if (!file_exists(path)) {
      free(path);
      continue;
    }
    TbrExamples e = tbr_examples_read(path);
    CHECK(e.n == file[i].n);
    CHECK(!e.row[0].reflection == (i > 0));
    CHECK(!e.row[0].label == (i < 3));
    tbr_examples_free(&e);
    free(path);
  }
}

int main(int argc, char **argv) {
  const char *real_files = getenv("TBR_REAL");
  scratch = check_folder(argc, argv);
  test_readers();
  test_bad_examples();
  test_round_trip();
  test_interleaving();
  test_limits();
  if (real_files && *real_files) test_real(real_files);
  return check_end();
}
