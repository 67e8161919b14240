/* Prints the ids of texts, for parity_tokenizers.py: tokens TOKENIZER <TEXTS, where
 * each text is a line in JSON; a line of ids for each, behind ~ if they don't
 * decode to the text, and `refused: why` for what is refused. With a file as second argument, its whole text is encoded
 * several times, and the seconds that the fastest took are printed; with `save`
 * and a folder, the tokenizer is written there. */
#include "../tbr.c"
#include "check.h"

static void print_ids(const TbrTokenizer *tok, const char *text, size_t n) {
  int32_t *ids;
  size_t m, count = tbr_encode(tok, text, n, &ids);
  char *back = tbr_decode(tok, ids, count, &m);
  if (m != n || memcmp(back, text, n)) printf("~");
  free(back);
  for (size_t i = 0; i < count; i++) printf("%ld ", (long)ids[i]);
  printf("\n");
  free(ids);
}

static void time_it(const TbrTokenizer *tok, const char *path) {
  size_t n;
  char *text = read_file(path, &n);
  double best = 1e9;
  for (int i = 0; i < 5; i++) {
    int32_t *ids;
    double began = now();
    tbr_encode(tok, text, n, &ids);
    double took = now() - began;
    if (took < best) best = took;
    free(ids);
  }
  printf("%.6f\n", best);
  free(text);
}

int main(int argc, char **argv) {
  if (argc < 2) return 2;
  double began = now();
  TbrTokenizer *tok = tbr_tokenizer_load(argv[1], 0);
  if (argc > 3) tbr_tokenizer_save(tok, argv[3]);
  if (argc == 3) printf("%.6f\n", now() - began);
  if (argc == 3) time_it(tok, argv[2]);
  if (argc > 2) return 0;
  size_t n;
  char *text = read_file("-", &n);
  JsonReader reader = {text, text + n, text, "texts", 1};
  for (json_blanks(&reader); reader.at < reader.end; json_blanks(&reader)) {
    Json *volatile value = json_value(&reader, 0);
    tbr_on_error(check_caught);
    if (setjmp(check_back))
      printf("refused: %s\n", check_said);
    else
      print_ids(tok, value->string, value->length);
    tbr_on_error(NULL);
    json_free(value);
  }
  free(text);
  tbr_tokenizer_free(tok);
  return 0;
}
