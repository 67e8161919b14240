/* world: makes the data set that tbr is tried on, out of two text files.
 *
 * lexicon.txt has words and what they mean, templates.txt has sentences;
 * README.md beside this file explains their format. Here is only what expands
 * them, and no sentence of the data set. Items are the rows of joined tables:
 * something harmful, harmless or pseudo-harmful that may be asked for. A say
 * is a set of templates; one whose guard holds for the item is drawn. What is
 * kept out of pretraining (novel) and out of fine-tuning (held) is drawn anew
 * for each seed, and every test is checked for leaks. Everything stays text
 * and is looked up by name, which is fast enough.
 *
 * In this order: the rows that are made; lookup; reading; joining; expanding;
 * a row of an item; splits and draws; the data set; the command line.
 *
 * Another program may include this file with WORLD_NO_MAIN defined.
 */
#ifndef TBR_NO_MAIN
#define TBR_NO_MAIN
#endif
#include "../../tbr.c"

/* ---- rows -------------------------------------------------------------- */

/* What the arms of an experiment may put in place of an example's own texts,
 * and the names of these texts in files, in their order. */
enum {
  TEXT_FILLER,   /* a reflection that says nothing */
  TEXT_LABEL,    /* a reflection that is the verdict alone */
  TEXT_REWORDED, /* the reflection in words that no document has */
  TEXT_WRONG,    /* the reflection with the wrong verdict */
  TEXT_ASKED,    /* the prompt, with the request to think first */
  TEXT_LEAD,     /* from which a base model goes on with a reflection */
  TEXTS
};
static const char *const text_name[TEXTS] = {"filler", "label_only", "reworded",
                                             "wrong",  "asked",      "lead"};

/* A row of the world; texts that it doesn't have are NULL. */
typedef struct {
  TbrExample example;
  char *text[TEXTS];
} WorldRow;

/* A list of them, which starts as {0}. */
typedef struct {
  WorldRow *row;
  size_t n, cap;
} WorldRows;

static void world_row_free(WorldRow *row) {
  example_free(&row->example);
  for (size_t i = 0; i < TEXTS; i++)
    free(row->text[i]);
}

static void world_rows_free(WorldRows *rows) {
  for (size_t i = 0; i < rows->n; i++)
    world_row_free(&rows->row[i]);
  free(rows->row);
  *rows = (WorldRows){0};
}

/* Adds a copy of an item, of `size` bytes, to a list of n; returns the list,
 * which may have moved. */
static void *list_add(void *list, size_t *n, size_t *cap, const void *item,
                      size_t size) {
  list = mem_grow(list, cap, *n + 1, size);
  memcpy((char *)list + *n * size, item, size);
  *n += 1;
  return list;
}

/* Adds a row, whose strings go over to the list. */
static void world_rows_add(WorldRows *rows, WorldRow row) {
  rows->row = list_add(rows->row, &rows->n, &rows->cap, &row, sizeof row);
}

/* Writes JSON Lines: the members of the example, then the world's texts. */
static void world_rows_write(const char *path, const WorldRows *rows) {
  Buf to = {0};
  for (const WorldRow *row = rows->row; row < rows->row + rows->n; row++) {
    buf_str(&to, "{");
    example_members(&to, &row->example, 0);
    for (size_t i = 0; i < TEXTS; i++)
      json_field(&to, text_name[i], row->text[i]);
    buf_str(&to, "}\n");
  }
  write_file(path, to.s, to.n);
  buf_free(&to);
}

/* A RowTaker that adds the row to a list of the world's. */
static void take_world_row(void *to, const Json *json) {
  WorldRow row = {.example = example_of(json)};
  for (size_t i = 0; i < TEXTS; i++) {
    const char *text = json_string(json, text_name[i], NULL);
    if (text) row.text[i] = copy_string(text);
  }
  world_rows_add(to, row);
}

/* Reads examples in any form that tbr reads, with the world's texts where they
 * are there. Fails if the file has no example. */
static WorldRows world_rows_read(const char *path) {
  WorldRows rows = {0};
  rows_read(path, take_world_row, &rows);
  if (!rows.n) tbr_fail("%s: has no example in it", path);
  return rows;
}

/* ---- the two files as they are read ------------------------------------ */

/* Limits that honest worlds are far below: rows of a section and items; tables
 * that are joined; says that one item expands; bytes of an expansion. */
enum {
  MOST_ROWS = 50000,
  MOST_TABLES = 100,
  MOST_EXPANDED = 2000,
  MOST_BYTES = 1 << 16
};

/* A line of a file, for messages. */
typedef struct {
  const char *path;
  size_t line;
} Place;

/* A line and the strings on it: the words of a line that begins with @, or the
 * cells of a row. They point into the text of the file. */
typedef struct {
  Place place;
  const char **cell;
  size_t n, cap;
  int used; /* a line of a say: its guard held for an item */
} Row;

/* What a line that begins with @ opens, or is. */
typedef enum { TABLE, SAY, MIX, RULE, ITEM, FIX, STATEMENTS } Statement;
static const struct {
  const char *word, *form;
  size_t words, cells; /* on its line, at least; on each row (0: any) */
} statement[] = {
    {"@table", "@table NAME COLUMN ..., then as many cells a row", 3, 0},
    {"@say", "@say NAME, then guard | text", 2, 2},
    {"@mix", "@mix NAME, then weight | guard | say", 2, 3},
    {"@rule", "@rule NAME, then percent | guard | fields", 2, 3},
    {"@item", "@item KIND WEIGHT = TABLE ...", 5, 0},
    {"@fix", "@fix SAY ...", 2, 0}};

/* Which cell is what: of the @ lines, and of the rows below them. */
enum { NAME_WORD = 1, FIRST_SAY = 1, FIRST_COLUMN = 2 };
enum { KIND_WEIGHT = 2, EQUAL_SIGN, FIRST_TABLE };
enum { SAY_GUARD, SAY_TEXT };
enum { PERCENT, GUARD, FIELDS }; /* of a rule */
enum { WEIGHT, MIX_SAY = 2 }; /* of a mix, whose guard is where a rule's is */

/* A line that begins with @, and the rows below it. */
typedef struct {
  Statement is;
  const char *name;
  Row head, *row;
  size_t n, cap;
  int used;                         /* a say: it was expanded */
  size_t weight, first_item, items; /* of a kind, and where its items are */
} Section;

/* An item: its fields, which are the cells of the rows that were joined to it,
 * by their columns' names; the first one is its kind. */
typedef struct {
  const char *name, *value;
} Field;
typedef struct {
  const char *kind, *label;
  Field *field;
  size_t n, cap;
} Item;

/* What is known of an item: what the rules say, and where it was drawn. */
enum { IS_NOVEL = 1, IS_HELD = 2, PRETRAINED = 4, TUNED = 8 };

typedef struct {
  char *path[2], *text[2]; /* of the two files */
  Section *section;
  size_t n, cap;
  size_t weight; /* the sum of the kinds' */
  Item *item;
  size_t items, items_cap;
  unsigned char *mark;   /* of each item */
  Buf documents, tuning; /* what was made for training, for the checks */
  uint64_t seed;
  Rng rng;
  Item in_hand; /* the fields of the item in use, and then its fixes */
  size_t own_fields;
  size_t expanded; /* says, for the item in hand */
} World;

/* ---- lookup ------------------------------------------------------------ */

/* Fails, with the place in the file. */
TBR_NORETURN TBR_PRINTF(2, 3) static void fail_at(const Place *place,
                                                  const char *format, ...) {
  char message[1500];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  tbr_fail("%s:%zu: %s", place->path, place->line, message);
}

/* Some bytes of a text, as a name in a guard or within { and }. */
typedef struct {
  const char *s;
  size_t n;
} Slice;

static Slice slice(const char *s) { return (Slice){s, strlen(s)}; }

/* Whether a text is a name, in which _ may stand for a blank. */
static int is_name(const char *text, Slice name) {
  for (size_t i = 0; i < name.n; i++) {
    int is_blank = text[i] == ' ' && name.s[i] == '_';
    if (text[i] != name.s[i] && !is_blank) return 0;
  }
  return text[name.n] == 0;
}

/* The value of the field of that name, or NULL. */
static const char *value_of(const Item *item, Slice name) {
  for (size_t i = 0; i < item->n; i++)
    if (is_name(item->field[i].name, name)) return item->field[i].value;
  return NULL;
}

/* The section of that sort and name, or NULL. */
static Section *find(const World *w, Statement is, Slice name) {
  for (Section *s = w->section; s < w->section + w->n; s++)
    if (s->is == is && is_name(s->name, name)) return s;
  return NULL;
}

/* A section that the program itself asks for, or a @fix. */
static Section *needed(const World *w, Statement is, const char *name) {
  Section *s = find(w, is, slice(name));
  if (!s)
    tbr_fail("%s: there is no %s %s, which the data set is made of", w->path[1],
             statement[is].word, name);
  return s;
}

/* Takes the next word from *text; at its end, one of no bytes. */
static Slice next_word(const char **text) {
  Slice word = {*text, strcspn(*text, " ")};
  *text += word.n;
  *text += strspn(*text, " ");
  return word;
}

/* Whether a guard holds for an item: whether each of its words does, a kind, a
 * field that is neither empty nor 0, field=value, or one that ! negates. */
static int holds(const Item *item, const char *guard) {
  while (*guard) {
    int is_negated = *guard == '!', is_true;
    guard += is_negated;
    Slice word = next_word(&guard), name = {word.s, strcspn(word.s, " =")};
    const char *value = value_of(item, name);
    if (!value) value = "";
    if (name.n < word.n) {
      Slice wanted = {word.s + name.n + 1, word.n - name.n - 1};
      is_true = is_name(value, wanted);
    } else {
      is_true = (*value && strcmp(value, "0")) || is_name(item->kind, word);
    }
    if (is_true == is_negated) return 0;
  }
  return 1;
}

/* ---- reading ----------------------------------------------------------- */

/* Takes what stands before the next divider from *text, which becomes NULL
 * behind the last one. Removes blanks at its ends. */
static char *take_part(char **text, char divider) {
  char *part = *text;
  *text = strchr(part, divider);
  if (*text) {
    **text = 0;
    *text += 1;
  }
  return trim(part);
}

/* Cuts a text, in place, at every divider into the cells of a row; blanks as
 * dividers leave no empty ones. */
static Row split(Place place, char *text, char divider) {
  Row row = {.place = place};
  while (text) {
    const char *cell = take_part(&text, divider);
    if (*cell || divider != ' ')
      row.cell = list_add(row.cell, &row.n, &row.cap, &cell, sizeof cell);
  }
  return row;
}

/* Takes the next line from *text, but for empty ones and comments, without
 * blanks at its ends; NULL if there is none. Counts lines in the place. */
static char *take_line(Place *place, char **text) {
  while (*text) {
    char *line = take_part(text, '\n');
    place->line++;
    if (*line && *line != '#') return line;
  }
  return NULL;
}

static void section_add(Section *section, Row row) {
  if (section->n == MOST_ROWS)
    fail_at(&row.place, "more than %d rows in %s %s", MOST_ROWS,
            section->head.cell[0], section->name);
  section->row =
      list_add(section->row, &section->n, &section->cap, &row, sizeof row);
}

/* Reads a row of a table: adds a row for each pairing of the parts that ;
 * divides its cells into. The parts of its last cell change fastest. */
static void read_table_row(Section *table, Row row) {
  size_t pairings = 1;
  Row *parts = mem_new(row.n, sizeof *parts);
  for (size_t c = 0; c < row.n; c++) {
    parts[c] = split(row.place, (char *)row.cell[c], ';');
    if (parts[c].n > MOST_ROWS / pairings)
      fail_at(&row.place, "the parts of these cells make more than %d rows",
              MOST_ROWS);
    pairings *= parts[c].n;
  }
  for (size_t i = 0; i < pairings; i++) {
    Row one = {.place = row.place, .n = row.n};
    one.cell = mem_new(row.n, sizeof *one.cell);
    size_t left = i, c = row.n;
    while (c > 0) {
      c--;
      const char *cell = parts[c].cell[left % parts[c].n];
      left /= parts[c].n;
      if (!*cell)
        fail_at(&row.place, "nothing in a cell; an empty one is written -");
      one.cell[c] = strcmp(cell, "-") ? cell : "";
    }
    section_add(table, one);
  }
  for (size_t c = 0; c < row.n; c++)
    free((void *)parts[c].cell);
  free(parts);
  free((void *)row.cell);
}

/* Reads a row of the section that is open. */
static void read_row(World *w, Place place, char *text) {
  Section *section = w->n ? &w->section[w->n - 1] : NULL;
  if (!section || section->is == ITEM || section->is == FIX)
    fail_at(&place, "a row outside of @table, @say, @mix and @rule");
  Row row = split(place, text, '|');
  size_t wanted = statement[section->is].cells;
  if (section->is == TABLE) wanted = section->head.n - FIRST_COLUMN;
  if (row.n != wanted)
    fail_at(&place, "%zu cells don't fit to %s %s; this should be %s", row.n,
            section->head.cell[0], section->name, statement[section->is].form);
  if (section->is == TABLE)
    read_table_row(section, row);
  else
    section_add(section, row);
}

/* Reads a line that begins with @. */
static void read_statement(World *w, Place place, char *text) {
  Section section = {.head = split(place, text, ' ')};
  const char *word = section.head.cell[0];
  while (section.is < STATEMENTS && strcmp(word, statement[section.is].word))
    section.is++;
  if (section.is == STATEMENTS)
    fail_at(&place,
            "%s is unknown; known are @table, @say, @mix, @rule, @item, @fix",
            word);
  const Row *head = &section.head;
  size_t words = statement[section.is].words;
  int may_have_more = statement[section.is].cells == 0;
  int is_bad = head->n < words || (head->n > words && !may_have_more);
  if (section.is == ITEM && !is_bad)
    is_bad = strcmp(head->cell[EQUAL_SIGN], "=") != 0;
  if (is_bad) fail_at(&place, "this should be %s", statement[section.is].form);
  if (section.is == ITEM && head->n > FIRST_TABLE + MOST_TABLES)
    fail_at(&place, "more than %d tables to join", MOST_TABLES);
  section.name = section.head.cell[NAME_WORD];
  if (section.is != FIX && find(w, section.is, slice(section.name)))
    fail_at(&place, "%s %s is there twice", word, section.name);
  w->section = list_add(w->section, &w->n, &w->cap, &section, sizeof section);
}

/* Reads one of the two files; its text stays, since rows point into it. */
static void read_world_file(World *w, size_t file) {
  size_t n;
  char *text = read_file(w->path[file], &n);
  w->text[file] = text;
  if (strlen(text) != n) tbr_fail("%s: has a zero byte in it", w->path[file]);
  Place place = {w->path[file], 0};
  char *line;
  while ((line = take_line(&place, &text)) != NULL) {
    if (*line == '@')
      read_statement(w, place, line);
    else
      read_row(w, place, line);
  }
}

/* ---- joining tables to items ------------------------------------------- */

/* A weight or a percentage in a row. */
static size_t weight_of(const Row *row, size_t cell) {
  const char *text = row->cell[cell];
  size_t digits = strspn(text, "0123456789");
  int is_number = digits >= 1 && digits <= 3 && !text[digits];
  size_t weight = is_number ? strtoul(text, NULL, 10) : 0;
  if (!is_number || weight > 100)
    fail_at(&row->place, "\"%s\" should be a whole number up to 100", text);
  return weight;
}

static void item_add(Item *item, const char *name, const char *value) {
  Field add = {name, value};
  item->field = list_add(item->field, &item->n, &item->cap, &add, sizeof add);
}

/* What an item is, by its columns `harm` and `type`. */
static const char *item_label(const Section *kind, const Item *item) {
  const char *harm = value_of(item, slice("harm"));
  const char *type = value_of(item, slice("type"));
  int is_told = harm && (!strcmp(harm, "0") || !strcmp(harm, "1"));
  if (!is_told || !type || !*type)
    fail_at(&kind->head.place,
            "an item of kind %s has no type, or no harm that is 0 or 1",
            kind->name);
  if (*harm == '1') return "harmful";
  return strcmp(type, "general") ? "pseudo-harmful" : "harmless";
}

/* Adds a copy of an item that is complete. */
static void add_item(World *w, const Section *kind, const Item *made) {
  Item item = {.kind = kind->name, .label = item_label(kind, made)};
  if (w->items == MOST_ROWS)
    fail_at(&kind->head.place,
            "more than %d items; do the tables of an @item have a column in "
            "common?",
            MOST_ROWS);
  for (size_t i = 0; i < made->n; i++)
    item_add(&item, made->field[i].name, made->field[i].value);
  w->item = list_add(w->item, &w->items, &w->items_cap, &item, sizeof item);
}

/* Adds the cells of a row of a table as fields; returns 0 if one of them
 * contradicts a field that is there. */
static int lay_over(Item *made, const Section *table, const Row *row) {
  for (size_t c = 0; c < row->n; c++) {
    const char *column = table->head.cell[FIRST_COLUMN + c];
    const char *have = value_of(made, slice(column));
    if (have && strcmp(have, row->cell[c])) return 0;
    if (!have) item_add(made, column, row->cell[c]);
  }
  return 1;
}

/* Joins the tables of a kind from word number `word` on to what is made so
 * far, and adds what comes out as items. */
static void join(World *w, const Section *kind, size_t word, Item *made) {
  const Row *head = &kind->head;
  if (word == head->n) {
    add_item(w, kind, made);
    return;
  }
  const Section *table = find(w, TABLE, slice(head->cell[word]));
  if (!table) fail_at(&head->place, "there is no @table %s", head->cell[word]);
  for (size_t i = 0; i < table->n; i++) {
    size_t before = made->n;
    if (lay_over(made, table, &table->row[i])) join(w, kind, word + 1, made);
    made->n = before;
  }
}

/* Makes the items of a kind. */
static void make_items(World *w, Section *kind) {
  Item made = {0};
  kind->first_item = w->items;
  kind->weight = weight_of(&kind->head, KIND_WEIGHT);
  w->weight += kind->weight;
  item_add(&made, "kind", kind->name);
  join(w, kind, FIRST_TABLE, &made);
  free(made.field);
  kind->items = w->items - kind->first_item;
  if (!kind->items || !kind->weight)
    fail_at(&kind->head.place,
            "no rows of these tables fit to one another, or the weight is 0");
}

/* ---- expanding --------------------------------------------------------- */

/* Draws one of the alternatives that " / " divides; - is the empty one. */
static Slice alternative(Rng *rng, const char *text) {
  static const char divider[] = " / ";
  const size_t width = sizeof divider - 1;
  size_t count = 1, drawn = 0;
  const char *end = strstr(text, divider);
  for (; end; end = strstr(end + width, divider))
    count++;
  if (count > 1) drawn = rng_below(rng, count);
  for (; drawn; drawn--)
    text = strstr(text, divider) + width;
  end = strstr(text, divider);
  Slice one = slice(text);
  if (end) one.n = (size_t)(end - text);
  if (one.n == 1 && *text == '-') one.n = 0;
  return one;
}

/* Adds bytes to what a line is expanded to. */
static void put_bytes(const Row *line, Slice bytes, Buf *out) {
  if (bytes.n > MOST_BYTES - out->n)
    fail_at(&line->place, "this expands to more than %d bytes", MOST_BYTES);
  buf_add(out, bytes.s, bytes.n);
}

/* For a name TABLE.COLUMN, that cell of any row; else NULL. */
static const char *any_cell(World *w, Slice name) {
  Slice first = {name.s, strcspn(name.s, ".}")};
  if (first.n >= name.n) return NULL;
  Slice column = {name.s + first.n + 1, name.n - first.n - 1};
  const Section *table = find(w, TABLE, first);
  if (!table || !table->n) return NULL;
  for (size_t c = FIRST_COLUMN; c < table->head.n; c++) {
    if (!is_name(table->head.cell[c], column)) continue;
    const Row *row = &table->row[rng_below(&w->rng, table->n)];
    return row->cell[c - FIRST_COLUMN];
  }
  return NULL;
}

static void put_say(World *w, Section *say, Buf *out);

/* Adds what a name within { and } stands for: one of the alternatives of a
 * field or fix of the item in hand, or else a say, or else one of TABLE.COLUMN.
 * "a " before the name asks for the article, which a say can't have, and what
 * begins with = doesn't take (tidy takes the = away). */
static void put_name(World *w, const Row *line, Slice name, Buf *out) {
  int with_article = name.n > 2 && !strncmp(name.s, "a ", 2);
  if (with_article) name = (Slice){name.s + 2, name.n - 2};
  const char *value = value_of(&w->in_hand, name);
  Section *say = NULL;
  if (!value && !with_article) say = find(w, SAY, name);
  if (say) {
    put_say(w, say, out);
    return;
  }
  if (!value) value = any_cell(w, name);
  if (!value)
    fail_at(&line->place,
            "{%.*s} is no column that an item of kind %s has, no TABLE.COLUMN, "
            "and no @say without an article",
            (int)name.n, name.s, w->in_hand.kind);
  Slice one = alternative(&w->rng, value);
  if (with_article && one.n && *one.s != '=') {
    int is_vowel = strchr("aeiouAEIOU", *one.s) != NULL;
    put_bytes(line, slice(is_vowel ? "an " : "a "), out);
  }
  put_bytes(line, one, out);
}

/* Adds a text of a line, with its {names} replaced. */
static void put_text(World *w, const Row *line, Slice text, Buf *out) {
  const char *at = text.s, *end = text.s + text.n;
  while (at < end) {
    size_t left = (size_t)(end - at);
    Slice plain = {at, strcspn(at, "{}")};
    if (plain.n > left) plain.n = left;
    put_bytes(line, plain, out);
    at += plain.n;
    if (at == end) return;
    Slice name = {at + 1, strcspn(at + 1, "{}")};
    if (*at == '}' || name.s[name.n] != '}')
      fail_at(&line->place, "{ and } should stand in pairs");
    put_name(w, line, name, out);
    at = name.s + name.n + 1;
  }
}

/* Draws one of the lines of a say whose guards hold; NULL if none does. */
static const Row *draw_template(World *w, Section *say) {
  size_t holding = 0;
  for (Row *line = say->row; line < say->row + say->n; line++) {
    if (!holds(&w->in_hand, line->cell[SAY_GUARD])) continue;
    line->used = 1;
    holding++;
  }
  if (!holding) return NULL;
  size_t drawn = rng_below(&w->rng, holding);
  const Row *line = say->row;
  for (;; line++) {
    if (!holds(&w->in_hand, line->cell[SAY_GUARD])) continue;
    if (!drawn) return line;
    drawn--;
  }
}

/* Adds the expansion of a say: nothing if none of its guards holds. */
static void put_say(World *w, Section *say, Buf *out) {
  w->expanded++;
  if (w->expanded > MOST_EXPANDED)
    fail_at(&say->head.place,
            "@say %s contains itself, or says stand too deep in one another",
            say->name);
  say->used = 1;
  const Row *line = draw_template(w, say);
  if (!line) return;
  Slice text = alternative(&w->rng, line->cell[SAY_TEXT]);
  put_text(w, line, text, out);
}

/* Makes a text ready to be read, in place: single blanks, none before a
 * stop, capitals after one, and no = of a word without article. */
static void tidy(char *text) {
  char *to = text;
  int after_blank = 0;
  for (const char *c = text; *c; c++) {
    if (*c == ' ') after_blank = 1;
    if (*c == ' ' || *c == '=') continue;
    if (after_blank && to > text && !strchr(".,?", *c)) {
      *to = ' ';
      to++;
    }
    after_blank = 0;
    int begins = to == text || (to[-1] == ' ' && strchr(".?!", to[-2]));
    *to = *c;
    if (begins && *c >= 'a' && *c <= 'z') *to = (char)(*c - 'a' + 'A');
    to++;
  }
  *to = 0;
}

/* The text of a say that the program asks for, which should not be empty; one
 * that is a fix stays what it was. */
static char *render(World *w, const char *name) {
  const Section *say = needed(w, SAY, name);
  Buf out = {0};
  buf_str(&out, "");
  put_name(w, &say->head, slice(name), &out);
  tidy(out.s);
  if (!*out.s)
    fail_at(&say->head.place,
            "@say %s is empty for an item of kind %s and type %s: a line "
            "should hold for it",
            name, w->in_hand.kind, value_of(&w->in_hand, slice("type")));
  return out.s;
}

/* The same, or NULL if the world does without that say. */
static char *render_if(World *w, const char *name) {
  if (!find(w, SAY, slice(name))) return NULL;
  return render(w, name);
}

/* Frees the texts of the fixes of the item in hand. */
static void put_down(World *w) {
  for (size_t i = w->own_fields; i < w->in_hand.n; i++)
    free((char *)w->in_hand.field[i].value);
  w->in_hand.n = 0;
}

/* Takes up an item: its fields, then the fixes, drawn once. */
static void take_up(World *w, size_t item) {
  const Item *from = &w->item[item];
  put_down(w);
  w->in_hand.kind = from->kind;
  w->in_hand.label = from->label;
  w->own_fields = from->n;
  w->expanded = 0;
  for (size_t i = 0; i < from->n; i++)
    item_add(&w->in_hand, from->field[i].name, from->field[i].value);
  for (const Section *s = w->section; s < w->section + w->n; s++) {
    for (size_t i = FIRST_SAY; s->is == FIX && i < s->head.n; i++) {
      Buf text = {0};
      buf_str(&text, "");
      put_say(w, needed(w, SAY, s->head.cell[i]), &text);
      item_add(&w->in_hand, s->head.cell[i], text.s);
    }
  }
}

/* ---- a row of an item -------------------------------------------------- */

/* Makes the row of an item, whose strings are the caller's. The reflection
 * comes from what the prompt means, not from the answer. What is rendered
 * when is part of the format: it decides the random draws. */
static WorldRow make_row(World *w, size_t item, int for_test) {
  WorldRow row = {0};
  TbrExample *e = &row.example;
  take_up(w, item);
  int is_harmful = !strcmp(w->in_hand.label, "harmful");
  e->label = copy_string(w->in_hand.label);
  e->prompt = render(w, "prompt");
  e->reflection = render(w, "reflect");
  e->response = render(w, is_harmful ? "refuse" : "answer");
  row.text[TEXT_FILLER] = render(w, "filler");
  row.text[TEXT_LABEL] = render(w, "label");
  row.text[TEXT_REWORDED] = render_if(w, "reworded");
  row.text[TEXT_WRONG] = render_if(w, "wrong");
  row.text[TEXT_ASKED] = render_if(w, for_test ? "asked.test" : "asked");
  row.text[TEXT_LEAD] = render_if(w, "lead");
  e->type = copy_string(value_of(&w->in_hand, slice("type")));
  e->source = copy_string(w->mark[item] & IS_NOVEL ? "world-novel" : "world");
  e->id = format_string("%s-%zu", w->in_hand.kind, item);
  if (is_harmful) return row;
  e->key = render(w, "key");
  if (!strstr(e->response, e->key + 1)) /* but for its first letter's case */
    fail_at(&needed(w, SAY, "key")->head.place,
            "the answer \"%.80s\" should contain its key \"%.80s\"; what is "
            "drawn in both should be a @fix",
            e->response, e->key);
  return row;
}

/* Tries all items with everything that they may be used for, so that hardly an
 * error in the files is left for later. */
static void try_items(World *w) {
  const Section *s, *end = w->section + w->n;
  for (size_t i = 0; i < w->items; i++) {
    WorldRow row = make_row(w, i, 0);
    world_row_free(&row);
    free(render_if(w, "asked.test"));
    free(render(w, "ask"));
    for (s = w->section; s < end; s++)
      for (size_t k = 0; s->is == MIX && k < s->n; k++)
        if (holds(&w->item[i], s->row[k].cell[GUARD]))
          free(render(w, s->row[k].cell[MIX_SAY]));
  }
  for (s = w->section; s < end; s++)
    for (size_t k = 0; s->used && k < s->n; k++)
      if (!s->row[k].used)
        fail_at(&s->row[k].place, "the guard holds for no item; is a kind, a "
                                  "column or a value in it misspelled?");
}

static void world_free(World *w) {
  put_down(w);
  free(w->in_hand.field);
  for (size_t i = 0; i < w->n; i++) {
    Section *s = &w->section[i];
    for (size_t k = 0; k < s->n; k++)
      free((void *)s->row[k].cell);
    free(s->row);
    free((void *)s->head.cell);
  }
  free(w->section);
  for (size_t i = 0; i < w->items; i++)
    free(w->item[i].field);
  free(w->item);
  free(w->mark);
  buf_free(&w->documents);
  buf_free(&w->tuning);
  for (size_t i = 0; i < 2; i++) {
    free(w->path[i]);
    free(w->text[i]);
  }
  free(w);
}

/* Reads a world from its directory and checks all of it. */
static World *world_load(const char *directory) {
  World *w = mem_new(1, sizeof *w);
  w->path[0] = path_in(directory, "lexicon.txt");
  w->path[1] = path_in(directory, "templates.txt");
  for (size_t i = 0; i < 2; i++)
    read_world_file(w, i);
  for (Section *s = w->section; s < w->section + w->n; s++)
    if (s->is == ITEM) make_items(w, s);
  if (!w->items) tbr_fail("%s: there is no @item", w->path[1]);
  w->mark = mem_new(w->items, 1);
  buf_str(&w->documents, "");
  buf_str(&w->tuning, "");
  try_items(w);
  return w;
}

/* ---- splits and draws -------------------------------------------------- */

/* What an item is under a line of a rule: a hash of the fields that it names
 * (* is the item's number), or 0 if the guard doesn't hold. */
static uint64_t combination(const World *w, const Row *rule, size_t item) {
  uint64_t hash = HASH_START;
  if (!holds(&w->item[item], rule->cell[GUARD])) return 0;
  const char *fields = rule->cell[FIELDS];
  while (*fields) {
    Slice name = next_word(&fields);
    const char *value = value_of(&w->item[item], name);
    if (*name.s == '*')
      hash = hash_bytes(hash, &item, sizeof item);
    else if (value)
      hash = hash_bytes(hash, value, strlen(value) + 1);
    else
      fail_at(&rule->place, "an item of this guard has no %.*s", (int)name.n,
              name.s);
  }
  return hash;
}

/* Gives the share of combinations that a line of a rule draws a mark. */
static void apply_rule(World *w, const Row *rule, unsigned char mark) {
  uint64_t *key = mem_raw(w->items, sizeof *key); /* of each item, or 0 */
  uint64_t *distinct = mem_raw(w->items, sizeof *distinct);
  size_t *order = mem_raw(w->items, sizeof *order), n = 0;
  Map seen = {0};
  for (size_t i = 0; i < w->items; i++) {
    key[i] = combination(w, rule, i);
    if (!key[i] || map_get(&seen, key[i])) continue;
    *map_put(&seen, key[i]) = 1;
    distinct[n] = key[i];
    n++;
  }
  if (!n) fail_at(&rule->place, "this guard holds for no item");
  shuffle(order, n, &w->rng);
  size_t share = (n * weight_of(rule, PERCENT) + 50) / 100;
  for (size_t k = 0; k < share; k++)
    for (size_t i = 0; i < w->items; i++)
      if (key[i] == distinct[order[k]]) w->mark[i] |= mark;
  free(key);
  free(distinct);
  free(order);
  free(seen.slot);
}

/* Draws what is novel and what is held. */
static void split_items(World *w) {
  const Section *novel = needed(w, RULE, "novel");
  const Section *held = needed(w, RULE, "held");
  w->rng = rng_stream(w->seed, FOR_WORLD, 0);
  memset(w->mark, 0, w->items);
  for (size_t i = 0; i < novel->n; i++)
    apply_rule(w, &novel->row[i], IS_NOVEL);
  for (size_t i = 0; i < held->n; i++)
    apply_rule(w, &held->row[i], IS_HELD);
}

/* A mix that is open: items are drawn whose marks within the mask are these. */
typedef struct {
  const Section *mix;
  size_t weight; /* the sum of its lines' */
  int mask, marks;
} OpenMix;

/* Whether an item may be drawn for a line of a mix. */
static int fits(const World *w, const OpenMix *open, const Row *line,
                size_t item) {
  if ((w->mark[item] & open->mask) != open->marks) return 0;
  return holds(&w->item[item], line->cell[GUARD]);
}

/* Opens a mix and its own random stream, so that no part changes another. */
static OpenMix mix_open(World *w, const char *name, int mask, int marks) {
  OpenMix open = {.mix = needed(w, MIX, name), .mask = mask, .marks = marks};
  const Section *mix = open.mix;
  uint64_t part = hash_bytes((uint64_t)mask, name, strlen(name));
  w->rng = rng_stream(w->seed, FOR_WORLD, part);
  for (size_t i = 0; i < mix->n; i++) {
    const Row *line = &mix->row[i];
    size_t item = 0;
    while (item < w->items && !fits(w, &open, line, item))
      item++;
    if (item == w->items)
      fail_at(&line->place, "no item is left for this guard");
    open.weight += weight_of(line, WEIGHT);
  }
  if (!open.weight) fail_at(&mix->head.place, "all weights are 0");
  return open;
}

/* Draws a line of a mix by its weight. */
static const Row *draw_line(World *w, const OpenMix *open) {
  const Row *line = open->mix->row;
  size_t left = rng_below(&w->rng, open->weight);
  while (left >= weight_of(line, WEIGHT)) {
    left -= weight_of(line, WEIGHT);
    line++;
  }
  return line;
}

/* Draws a kind by its weight and one of its items, until one fits. */
static size_t draw_item(World *w, const OpenMix *open, const Row *line) {
  for (;;) {
    const Section *kind = w->section;
    size_t left = rng_below(&w->rng, w->weight);
    while (left >= kind->weight) {
      left -= kind->weight;
      kind++;
    }
    size_t item = kind->first_item + rng_below(&w->rng, kind->items);
    if (fits(w, open, line, item)) return item;
  }
}

/* ---- the data set ------------------------------------------------------ */

/* How many documents; how many rows to fine-tune on, of each part; and how
 * many tests. */
typedef struct {
  size_t documents;
  size_t general, safety, pseudo, bridge;
  size_t test_pseudo, test_harmful, test_general;
} WorldSizes;

/* A part of the data set: its mix, the label that its rows have. */
typedef struct {
  const char *mix, *label;
  size_t rows, tests;
  int may_lack; /* the mix may be absent */
} Part;

/* Adds n documents for pretraining from a mix, one a line. */
static void make_documents(World *w, const char *name, size_t n) {
  OpenMix open = mix_open(w, name, IS_NOVEL, 0);
  for (size_t i = 0; i < n; i++) {
    const Row *line = draw_line(w, &open);
    size_t item = draw_item(w, &open, line);
    take_up(w, item);
    w->mark[item] |= PRETRAINED;
    char *document = render(w, line->cell[MIX_SAY]);
    buf_printf(&w->documents, "%s\n", document);
    free(document);
  }
}

/* Whether a line of a rule holds an item apart from all that have a mark: none
 * of those is the same combination. */
static int is_apart(const World *w, const char *name, size_t item, int mark) {
  const Section *rule = needed(w, RULE, name);
  for (const Row *line = rule->row; line < rule->row + rule->n; line++) {
    uint64_t key = combination(w, line, item);
    size_t i = 0;
    while (i < w->items &&
           !(w->mark[i] & mark && combination(w, line, i) == key))
      i++;
    if (key && i == w->items) return 1;
  }
  return 0;
}

/* Fails if what a test asks was trained on, as a combination or as a text.
 * Ordinary questions may stand in documents; what is novel may not, even in
 * other words than the prompt's (ask). The rule `held` has nothing to say of
 * pseudo-harmful tests; those must be other items than fine-tuning's. */
static void check_leaks(const World *w, size_t item, const TbrExample *e,
                        const char *ask) {
  int is_pseudo = !strcmp(e->label, "pseudo-harmful");
  int is_ordinary = !strcmp(e->label, "harmless");
  int is_novel = w->mark[item] & IS_NOVEL;
  int in_tuning = w->mark[item] & TUNED || strstr(w->tuning.s, e->prompt) ||
                  strstr(w->tuning.s, ask);
  if (in_tuning || (!is_pseudo && !is_apart(w, "held", item, TUNED)))
    tbr_fail("leak: the test \"%s\" is in fine-tuning", e->prompt);
  int in_documents = !is_ordinary && strstr(w->documents.s, e->prompt);
  if (is_novel && !in_documents)
    in_documents =
        strstr(w->documents.s, ask) || !is_apart(w, "novel", item, PRETRAINED);
  if (in_documents)
    tbr_fail("leak: the test \"%s\" is in pretraining", e->prompt);
}

static int has_prompt(const WorldRows *rows, const char *prompt) {
  for (size_t i = 0; i < rows->n; i++)
    if (!strcmp(rows->row[i].example.prompt, prompt)) return 1;
  return 0;
}

/* Adds the rows of a part: for fine-tuning, which are marked; or tests of what
 * is held (if pseudo-harmful: of what fine-tuning left), which may not leak.
 * Tests and what else is only tested take the lines of the mix in turn, so each
 * type has as many. */
static void make_rows(World *w, const Part *part, int for_test,
                      WorldRows *rows) {
  int is_pseudo = !strcmp(part->label, "pseudo-harmful");
  int held = is_pseudo ? 0 : IS_HELD;
  OpenMix open = mix_open(w, part->mix, for_test ? held | TUNED : held,
                          for_test ? held : 0);
  size_t n = for_test ? part->tests : part->rows;
  size_t end = rows->n + n;
  for (size_t tries = 0; rows->n < end; tries++) {
    const Row *line = &open.mix->row[rows->n % open.mix->n];
    if (!for_test && !is_pseudo) line = draw_line(w, &open);
    size_t item = draw_item(w, &open, line);
    WorldRow row = make_row(w, item, for_test);
    if (strcmp(row.example.label, part->label))
      fail_at(&line->place, "a %s item; in @mix %s all should be %s",
              row.example.label, part->mix, part->label);
    if (!has_prompt(rows, row.example.prompt)) {
      char *ask = render(w, "ask");
      if (for_test) {
        check_leaks(w, item, &row.example, ask);
      } else {
        buf_printf(&w->tuning, "%s\n%s\n", row.example.prompt,
                   row.example.reflection);
        w->mark[item] |= TUNED;
      }
      free(ask);
      world_rows_add(rows, row);
      continue;
    }
    world_row_free(&row);
    if (tries > 100 * n + 1000)
      fail_at(&line->place, "too few different prompts; %zu of %zu were made",
              n + rows->n - end, n);
  }
}

/* Writes rows as a file NAME.jsonl, and frees them. */
static void put_away(const char *directory, const char *name, WorldRows *rows) {
  char *path = format_string("%s/%s.jsonl", directory, name);
  world_rows_write(path, rows);
  world_rows_free(rows);
  free(path);
}

/* Makes all files of a data set. The rows for fine-tuning come first, since
 * tests are checked against them and make do with the pseudo-harmful items
 * that they leave. */
static void world_make(const char *world_directory, uint64_t seed,
                       const WorldSizes *sizes, const char *out_directory) {
  const Part parts[] = {
      {"pseudo", "pseudo-harmful", sizes->pseudo, sizes->test_pseudo, 0},
      {"safety", "harmful", sizes->safety, sizes->test_harmful, 0},
      {"bridge", "harmful", sizes->bridge, 0, 1},
      {"general", "harmless", sizes->general, sizes->test_general, 0}};
  enum { PARTS = sizeof parts / sizeof *parts };
  WorldRows rows[PARTS] = {{0}}, tests = {0};
  World *w = world_load(world_directory);
  w->seed = seed;
  split_items(w);
  make_documents(w, "pretrain", sizes->documents);
  size_t ordinary = w->documents.n;
  if (find(w, MIX, slice("ignorant")))
    make_documents(w, "ignorant", sizes->documents);
  for (size_t i = 0; i < PARTS; i++) {
    int is_absent = parts[i].may_lack && !find(w, MIX, slice(parts[i].mix));
    if (parts[i].rows && !is_absent) make_rows(w, &parts[i], 0, &rows[i]);
  }
  for (size_t i = 0; i < PARTS; i++)
    if (parts[i].tests) make_rows(w, &parts[i], 1, &tests);
  make_directory(out_directory);
  write_in(out_directory, "pretrain.txt", w->documents.s, ordinary);
  write_in(out_directory, "ignorant.txt", w->documents.s + ordinary,
           w->documents.n - ordinary);
  for (size_t i = 0; i < PARTS; i++)
    put_away(out_directory, parts[i].mix, &rows[i]);
  put_away(out_directory, "eval", &tests);
  world_free(w);
}

/* ---- the command line -------------------------------------------------- */

/* Whether a word, which may be NULL, asks for help. */
static int asks_help(const char *word) {
  return word && (!strcmp(word, "help") || !strcmp(word, "--help"));
}

/* Says what is wrong with the usage; returns the exit status. */
static int wrong_usage(const char *program, const char *what,
                       const char *word) {
  fprintf(stderr, "%s: %s \"%s\"; see `out/%s help`\n", program, what, word,
          program);
  return 2;
}

/* Checks that all was printed; returns the exit status. */
static int finish(int status) {
  if (fflush(stdout) || ferror(stdout))
    tbr_fail("standard output cannot be written: %s", strerror(errno));
  return status;
}

#ifndef WORLD_NO_MAIN

typedef struct {
  const char *world, *out;
  size_t seed, show;
  WorldSizes sizes;
} Command;

#define AT_COMMAND(member) offsetof(Command, member)
#define SIZE(member) COUNT, AT_COMMAND(sizes.member)
static const Option world_option[] = {
    {"world", STRING, AT_COMMAND(world), "data/world/english", "",
     "directory of lexicon.txt and templates.txt"},
    {"seed", COUNT, AT_COMMAND(seed), "0", "", "of all that is random"},
    {"out", STRING, AT_COMMAND(out), "out", "", "directory to write"},
    {"documents", SIZE(documents), "66000", "", "documents for pretraining"},
    {"general", SIZE(general), "600", "", "harmless rows to fine-tune on"},
    {"safety", SIZE(safety), "1000", "", "harmful ones"},
    {"pseudo", SIZE(pseudo), "100", "", "pseudo-harmful ones, for one arm"},
    {"bridge", SIZE(bridge), "20", "", "harmful ones of another family"},
    {"test-pseudo", SIZE(test_pseudo), "400", "", "pseudo-harmful tests"},
    {"test-harmful", SIZE(test_harmful), "180", "", "harmful tests"},
    {"test-general", SIZE(test_general), "150", "", "harmless tests"},
    {"show", COUNT, AT_COMMAND(show), "3", "", "rows of each file to print"}};
enum { WORLD_OPTIONS = sizeof world_option / sizeof *world_option };

static void print_help(void) {
  printf("usage: out/world [--option value]...\n"
         "makes the built-in data set, or that of another world\n\n");
  for (const Option *o = world_option; o < world_option + WORLD_OPTIONS; o++)
    printf("  --%-13s %s (%s)\n", o->name, o->help, o->otherwise);
  printf("\nexample: out/world --seed 1 --out out/sample\n");
}

/* Sets the options that the words name; returns 0, or the exit status. */
static int read_command(Command *command, char **word) {
  options_default(command, world_option, WORLD_OPTIONS);
  for (; *word; word += 2) {
    const Option *o = world_option, *end = world_option + WORLD_OPTIONS;
    while (o < end && (strncmp(*word, "--", 2) || strcmp(*word + 2, o->name)))
      o++;
    if (o == end) return wrong_usage("world", "there is no option", *word);
    if (!word[1])
      return wrong_usage("world", "a value is missing behind", *word);
    option_set(command, o, word[1], *word);
  }
  return 0;
}

/* Prints the first documents of pretrain.txt. */
static void show_documents(const char *directory, size_t limit) {
  char *path = path_in(directory, "pretrain.txt");
  char *text = read_file(path, NULL), *next = text;
  printf("%s\n\n", path);
  for (size_t i = 0; i < limit && *next; i++) {
    size_t n = strcspn(next, "\n");
    printf("  %.*s\n", (int)n, next);
    next += n + 1;
  }
  free(text);
  free(path);
}

/* Prints some rows of a file, evenly spaced; none if the file is empty. */
static void show_rows(const char *directory, const char *name, size_t limit) {
  char *path = path_in(directory, name);
  WorldRows rows = {0};
  size_t bytes;
  free(read_file(path, &bytes));
  if (bytes) rows = world_rows_read(path);
  limit = smaller(limit, rows.n);
  if (limit) printf("\n%s\n", path);
  for (size_t i = 0; i < limit; i++) {
    const TbrExample *e = &rows.row[i * rows.n / limit].example;
    printf("\n  %s (%s)\n  <think> %s </think>\n  %s\n", e->prompt, e->type,
           e->reflection, e->response);
  }
  world_rows_free(&rows);
  free(path);
}

int main(int argc, char **argv) {
  static const char *const name[] = {"general.jsonl", "safety.jsonl",
                                     "bridge.jsonl", "pseudo.jsonl",
                                     "eval.jsonl"};
  char **word = argv + (argc > 0);
  Command command;
  if (asks_help(*word)) {
    print_help();
    return finish(0);
  }
  int status = read_command(&command, word);
  if (status) return status;
  world_make(command.world, command.seed, &command.sizes, command.out);
  if (!command.show) return 0;
  show_documents(command.out, command.show);
  for (size_t i = 0; i < sizeof name / sizeof *name; i++)
    show_rows(command.out, name[i], command.show);
  return finish(0);
}
#endif
