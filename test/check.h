/* check.h: counts what holds and what doesn't; a line for each failure.
 * A test includes ../tbr.c with TBR_NO_MAIN defined, and then this. */
#ifndef CHECK_H
#define CHECK_H

#include <setjmp.h>

static size_t passed, failed;

/* Counts one check; prints where it is and what was found if it fails. */
TBR_PRINTF(4, 5)
static inline int check(int good, const char *file, int line,
                        const char *format, ...) {
  if (good) return passed++, 1;
  va_list args;
  va_start(args, format);
  printf("%s:%d: ", file, line);
  vprintf(format, args);
  printf("\n");
  va_end(args);
  return failed++, 0;
}

/* The condition holds. */
#define CHECK(c) check((c) != 0, __FILE__, __LINE__, "not so: %s", #c)

/* Two whole numbers are equal. Like those below, a function, so that what is
 * compared is computed once. */
#define EQUAL(a, b) \
  check_equal((long long)(a), (long long)(b), __FILE__, __LINE__, #a)

static inline int check_equal(long long a, long long b, const char *file,
                              int line, const char *what) {
  return check(a == b, file, line, "%s is %lld, should be %lld", what, a, b);
}

/* a is at most `bound` away from b. */
#define NEAR(a, b, bound)                                              \
  check_near((double)(a), (double)(b), (double)(bound), __FILE__, __LINE__, \
             #a)

static inline int check_near(double a, double b, double bound,
                             const char *file, int line, const char *what) {
  return check(fabs(a - b) <= bound, file, line,
               "%s is %.9g, should be %.9g within %g", what, a, b, bound);
}

/* a is at most `bound`; not a number isn't. */
#define AT_MOST(a, bound) \
  check_at_most((double)(a), (double)(bound), __FILE__, __LINE__, #a)

static inline int check_at_most(double a, double bound, const char *file,
                                int line, const char *what) {
  return check(a <= bound, file, line, "%s is %.3g, should be at most %.3g",
               what, a, bound);
}

/* Two texts are equal. */
#define SAME(a, b)                                                           \
  check(!strcmp(a, b), __FILE__, __LINE__, "%s is \"%s\", should be \"%s\"", \
        #a, a, b)

/* Two arrays of n numbers have the same bits. */
#define BITS(a, b, n)                                                        \
  check(!memcmp(a, b, (n) * sizeof *(a)), __FILE__, __LINE__,                \
        "%s and %s differ, first at number %zu", #a, #b,                     \
        check_differs(a, b, (n) * sizeof *(a)) / sizeof *(a))

static inline size_t check_differs(const void *a, const void *b, size_t n) {
  const char *x = a, *y = b;
  size_t i = 0;
  while (i < n && x[i] == y[i]) i++;
  return i;
}

static jmp_buf check_back;
static char check_said[2048];

static inline void check_caught(const char *message) {
  snprintf(check_said, sizeof check_said, "%s", message);
  longjmp(check_back, 1);
}

/* The statement fails with a message that has these words in it. Variables
 * of the caller that change between are volatile. */
#define FAILS(statement, words)                                              \
  do {                                                                       \
    check_said[0] = 0;                                                       \
    tbr_on_error(check_caught);                                              \
    if (!setjmp(check_back)) {                                               \
      statement;                                                             \
    }                                                                        \
    tbr_on_error(NULL);                                                      \
    check(check_said[0] && strstr(check_said, words), __FILE__, __LINE__,    \
          "%s: should fail with \"%s\", said \"%s\"", #statement, words,     \
          check_said);                                                       \
  } while (0)

/* Whether a token is special. */
static inline int is_special(const TbrTokenizer *t, int32_t id) {
  return t->token[id].kind == SPECIAL;
}

/* Where a test may write: its first argument. */
static inline const char *check_folder(int argc, char **argv) {
  const char *folder = argc > 1 ? argv[1] : "out/scratch";
  make_directory(folder);
  setvbuf(stdout, NULL, _IOLBF, BUFSIZ); /* for what is said before a crash */
  return folder;
}

/* The last line of every test program; returns its exit status. */
static inline int check_end(void) {
  printf("%zu passed, %zu failed\n", passed, failed);
  return failed > 0;
}

#endif
