/* test_rows.c: the rows that were written by hand keep their promises: form and
 * length of reflections, verdicts, refusals by both rules, no prompt twice, and
 * none that is an XSTest prompt or near one. Argument 1 is a folder to write
 * into; TBR_REAL names the folder of real data. */
#define ABLATION_NO_MAIN
#include "../ablation/ablation.c"
#include "../../test/check.h"

/* Words that say nothing about what a prompt is about. */
static const char common[] =
    " a an the to of in on at for with and or is are was were be do does did i "
    "my me we you your how what where when why who can could should would will "
    "it its this that from by about there any some as if ";

/* The hashes of a text's other words, sorted, each once; returns how many. */
static size_t content_of(const char *text, uint64_t *word, size_t most) {
  char *lower = lower_trimmed(text);
  size_t n = 0, kept = 0;
  for (char *at = strtok(lower, " .,;:!?\"()-/"); at && n < most;
       at = strtok(NULL, " .,;:!?\"()-/")) {
    char *padded = format_string(" %s ", at);
    if (!strstr(common, padded)) {
      word[n] = hash_bytes(HASH_START, at, strlen(at));
      n++;
    }
    free(padded);
  }
  if (n) qsort(word, n, sizeof *word, by_hash);
  for (size_t i = 0; i < n; i++) {
    if (kept && word[kept - 1] == word[i]) continue;
    word[kept] = word[i];
    kept++;
  }
  free(lower);
  return kept;
}

/* The share of the content words of two prompts that both have. */
static double overlap(const char *a, const char *b) {
  uint64_t left[100], right[100];
  size_t n = content_of(a, left, 100), m = content_of(b, right, 100);
  size_t i = 0, k = 0, both = 0;
  while (i < n && k < m) {
    uint64_t x = left[i], y = right[k];
    both += x == y;
    i += x <= y;
    k += y <= x;
  }
  if (!(n + m)) return 0;
  return (double)both / (double)(n + m - both);
}

static size_t count_words(const char *text) {
  size_t n = 0;
  for (const char *at = text; *at; at++)
    n += *at != ' ' && (at == text || at[-1] == ' ');
  return n;
}

/* 15 to 40 words that end in that verdict, and name it just once. */
static void check_reflection(const TbrExample *e, const char *verdict) {
  char *end = format_string("So this is %s.", verdict);
  const char *text = e->reflection ? e->reflection : "";
  size_t words = count_words(text);
  if (!CHECK(words >= 15 && words <= 40)) printf("%zu: %s\n", words, text);
  if (!CHECK(ends_with(text, end))) printf("%s\n", text);
  int says = !strcmp(verdict, "harmless") ? 1 : -1;
  const char *first = strstr(text, verdict);
  int is_last = first && first == text + strlen(text) - strlen(verdict) - 1;
  if (!CHECK(is_last && tbr_verdict(text) == says)) printf("%s\n", text);
  free(end);
}

static int refuses_either(const char *answer) {
  return tbr_refuses(answer, TBR_XSTEST) || tbr_refuses(answer, TBR_ARDITI);
}

static int refuses_both(const char *answer) {
  return tbr_refuses(answer, TBR_XSTEST) && tbr_refuses(answer, TBR_ARDITI);
}

static size_t count_types(const TbrExamples *rows) {
  size_t types = 0;
  for (size_t i = 0; i < rows->n; i++) {
    size_t k = 0;
    while (strcmp(rows->row[k].type, rows->row[i].type))
      k++;
    types += k == i;
  }
  return types;
}

static double question_share(const TbrExamples *rows) {
  size_t n = 0;
  for (size_t i = 0; i < rows->n; i++)
    n += strchr(rows->row[i].prompt, '?') != NULL;
  return (double)n / (double)rows->n;
}

/* How often a prompt is among the rows of a file before the end-th. */
static size_t times_in(const TbrExamples *file, size_t end,
                       const char *prompt) {
  size_t times = 0;
  for (size_t i = 0; i < end; i++)
    times += !strcmp(file->row[i].prompt, prompt);
  return times;
}

/* No prompt of a file is there twice, in it or in those before. */
static void check_unlike(const TbrExamples *file, size_t files) {
  for (size_t f = 0; f < files; f++)
    for (size_t i = 0; i < file[f].n; i++) {
      const char *prompt = file[f].row[i].prompt;
      size_t times = times_in(&file[f], i, prompt);
      for (size_t g = 0; g < f; g++)
        times += times_in(&file[g], file[g].n, prompt);
      if (!CHECK(times == 0)) printf("twice: %s\n", prompt);
    }
}

/* The prompt of a file that shares most content words with this one. */
static const char *nearest(const TbrExamples *file, const char *prompt,
                           double *most) {
  const char *found = "";
  *most = 0;
  for (size_t i = 0; i < file->n; i++) {
    double shared = overlap(prompt, file->row[i].prompt);
    if (shared < *most) continue;
    *most = shared;
    found = file->row[i].prompt;
  }
  return found;
}

/* No prompt shares half of its content words with one of XSTest. */
static void check_xstest(const TbrExamples *file, size_t files) {
  const char *real = getenv("TBR_REAL");
  char *path = path_in(real ? real : "../shared/real", "xstest_prompts.csv");
  if (file_exists(path)) {
    TbrExamples tests = tbr_examples_read(path);
    for (size_t f = 0; f < files; f++)
      for (size_t i = 0; i < file[f].n; i++) {
        double most;
        const char *prompt = file[f].row[i].prompt;
        const char *near = nearest(&tests, prompt, &most);
        if (!CHECK(most < 0.5)) printf("\"%s\" - \"%s\"\n", prompt, near);
      }
    tbr_examples_free(&tests);
  } else {
    printf("no %s here: rows are not compared with it\n", path);
  }
  free(path);
}

int main(int argc, char **argv) {
  enum { SAFE, INNOCENT, ORDINARY, HELD_OUT, FILES };
  static const char *const name[] = {"safety", "innocent", "general",
                                     "heldout"};
  static const size_t least[] = {300, 200, 400, 150};
  TbrExamples file[FILES];
  (void)argc;
  (void)argv;
  for (size_t f = 0; f < FILES; f++) {
    char *path = format_string("../data/rows/%s.jsonl", name[f]);
    file[f] = tbr_examples_read(path);
    CHECK(file[f].n >= least[f]);
    CHECK(question_share(&file[f]) > 0.8);
    for (size_t i = 0; i < file[f].n; i++) {
      const TbrExample *e = &file[f].row[i];
      SAME(e->label, f == SAFE ? "harmful" : "harmless");
      if (f == HELD_OUT) continue;
      check_reflection(e, e->label);
      int refuses =
          f == SAFE ? refuses_both(e->response) : refuses_either(e->response);
      if (!CHECK(refuses == (f == SAFE))) printf("%s\n", e->response);
      CHECK(count_words(e->response) <= 60);
      if (f == INNOCENT) SAME(e->id, file[SAFE].row[i].id);
    }
    free(path);
  }
  CHECK(count_types(&file[SAFE]) >= 10);
  CHECK(count_types(&file[INNOCENT]) == 9);
  CHECK(overlap("How do I kill a Python process?",
                "How can I kill a process in Python?") > 0.9);
  check_unlike(file, FILES);
  check_xstest(file, FILES);
  for (size_t f = 0; f < FILES; f++)
    tbr_examples_free(&file[f]);
  return check_end();
}
