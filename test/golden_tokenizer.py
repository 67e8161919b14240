"""Makes the golden files of chapter 5 and checks that others agree with it.

  python3 golden_tokenizer.py [FOLDER]      (default: golden, beside this file)

Writes FOLDER/byte_level.json (training text, vocabulary, merges as a naive
trainer finds them, strings and their ids as Hugging Face tokenizers gives
them for OUR tokenizer.json) and, where shared/real is there, FOLDER/tok512.json
(strings and ids by llama2.c's own algorithm, written down naively here).
Exit status 1 if anything disagrees.
"""
import collections, json, os, random, re, struct, subprocess, sys, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = sys.argv[1] if len(sys.argv) > 1 else os.path.join(HERE, "golden")
REAL = os.environ.get(
    "TBR_REAL", os.path.join(HERE, "..", "..", "shared", "real"))
DRIVER = r"""
#include "../tbr.c"
int main(int argc, char **argv) {
  TbrTokenizer *t;
  if (!strcmp(argv[1], "train")) {
    size_t n;
    char *s = read_file(argv[2], &n);
    t = tbr_tokenizer_train(s, n, (size_t)atoi(argv[3]));
    tbr_tokenizer_save(t, argv[4]);
    free(s);
  } else {
    t = tbr_tokenizer_load(argv[2], 0);
    for (int i = 4; i < argc; i++)
      token_add(t, SPECIAL, argv[i], strlen(argv[i]), argv[2]);
    if (!strcmp(argv[1], "save")) tbr_tokenizer_save(t, argv[3]);
    Json *j = !strcmp(argv[1], "encode") ? json_read("-") : NULL;
    for (Json *v = j ? j->child : NULL; v; v = v->next) {
      int32_t *ids;
      size_t m, k = tbr_encode(t, v->string, v->length, &ids);
      char *back = tbr_decode(t, ids, k, &m);
      if (m != v->length || memcmp(back, v->string, m)) tbr_fail("round trip");
      for (size_t i = 0; i < k; i++) printf("%d ", (int)ids[i]);
      printf("\n");
      free(ids);
      free(back);
    }
    json_free(j);
  }
  tbr_tokenizer_free(t);
  return 0;
}
"""
TEXT = ("The quick brown fox jumps over the lazy dog. How do I kill a Python "
        "process? How do I kill time at the airport?\n\tIt's 10 to 12, isn't "
        "it -- \"yes\", she said... the   end\n\n\nNaïve café, Größe, 日本語 "
        "日本語, 🙂🙂 <think>the thing</think> <|user|> (a+b)*(a-b) = a*a - b*b "
        "aaaa aaaaaaaa abab ababab\r\n ") * 3
CASES = ["", " ", "  ", "   a", "a ", "a  b", "a   b", "\n", " \n", "\n a",
         "a\n\n\nb", "\t\tx", "a \n b", "\r\n\r\n", "The quick brown fox",
         " the the  the", "isn't it's I'll", "12345 67 8a9b", "x1 y 22  3",
         "...!? -- (a+b)*(a-b)", " ...", "  ...", "a.b,c;d", "_under_score__",
         "naïve café Größe", "日本語のテキスト", "🙂🙃 👩‍👩‍👧", "\u00a0nbsp\u00a0x",
         "\u2028line\u3000wide", "\x0b\x0c v f", "\x00zero\x01\x1f\x7f\x80",
         "<0x41> <0x0A>", "< think > <thin k>", "aaaaaaaaaaaaaaaaaaaaaaa",
         "abababababa", "a" * 300, "How do I kill a Python process?",
         "[x] {y} `z` ^~@ \\ / \"q\"", "\ufffd\ufeffbom", "e\u0301 combining",
         "\U0010ffff end", "mixedCASE WordsÀÉ", "tab\tin\tline  \t  end  "]
bad = 0


def check(ok, *what):
    global bad
    if not ok:
        bad += 1
        print("DIFFERS:", *what)


def driver(folder):
    source, program = folder + "/driver.c", folder + "/driver"
    open(source, "w").write(DRIVER)
    subprocess.check_call(["cc", "-std=c99", "-O2", "-w", "-fopenmp",
                           "-ffp-contract=off", "-DTBR_NO_MAIN",
                           "-I" + HERE, source,
                           "-o", program, "-lm"])
    return program


def ours(program, path, strings):
    got = subprocess.run([program, "encode", path], capture_output=True,
                         input=json.dumps(strings).encode(), check=True)
    return [[int(x) for x in l.split()] for l in
            got.stdout.decode().split("\n")[:-1]]


def words(text):
    """The cutting rule, once more and independently."""
    return re.findall(r" ?[A-Za-z\x80-\U0010ffff]+| ?[0-9]"
                      r"| ?[^\t-\r 0-9A-Za-z\x80-\U0010ffff]+"
                      r"|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+", text)


def naive_train(text, vocab):
    """Recounts everything after every merge."""
    tokens = [bytes([b]) for b in range(256)]
    count = collections.Counter(words(text))
    seq = {w: [6 + b for b in w.encode()] for w in count}
    merges = []
    while len(tokens) + 6 < vocab:
        pairs = collections.Counter()
        for w, n in count.items():
            for p in zip(seq[w], seq[w][1:]):
                pairs[p] += n
        best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
        if best is None or pairs[best] < 2:
            break
        new = tokens[best[0] - 6] + tokens[best[1] - 6]
        if new not in tokens:
            tokens.append(new)
        merges.append(best)
        for s in seq.values():
            i = 0
            while i + 1 < len(s):
                if (s[i], s[i + 1]) == best:
                    s[i:i + 2] = [6 + tokens.index(new)]
                i += 1
    return merges


def llama2c(path):
    """llama2.c's vocabulary and its encoding, which takes quadratic time."""
    b, at, vocab, score = open(path, "rb").read(), 4, [], []
    while at < len(b):
        s, n = struct.unpack_from("<fI", b, at)
        vocab.append(b[at + 8:at + 8 + n])
        score.append(s)
        at += 8 + n
    index = {v: i for i, v in reversed(list(enumerate(vocab)))}

    def encode(text):
        ids = [index[b" "]] if text else []
        for c in text:
            c = c.encode()
            ids += [index[c]] if c in index else [x + 3 for x in c]
        while True:
            best = None
            for i in range(len(ids) - 1):
                k = index.get(vocab[ids[i]] + vocab[ids[i + 1]])
                if k is not None and (best is None or score[k] > best[0]):
                    best = score[k], k, i
            if best is None:
                return ids
            ids[best[2]:best[2] + 2] = [best[1]]
    return encode


def byte_level(program, folder):
    from tokenizers import Tokenizer
    text = folder + "/text.txt"
    open(text, "w", newline="").write(TEXT)
    path = folder + "/byte"
    subprocess.check_call([program, "train", text, "400", path])
    hf = Tokenizer.from_file(path + "/tokenizer.json")
    vocab = hf.get_vocab()
    file = json.load(open(path + "/tokenizer.json"))
    merges = [[vocab[x] for x in m.split(" ")] for m in file["model"]["merges"]]
    check(merges == [list(m) for m in naive_train(TEXT, 400)], "merges")
    got = ours(program, path, CASES)
    want = [hf.encode(s, add_special_tokens=False).ids for s in CASES]
    for s, a, b in zip(CASES, got, want):
        check(a == b, "byte level", repr(s), a, b)
        check(hf.decode(b) == s, "decode", repr(s))
    random.seed(1)
    signs = list("abcXYZ  \t\n\r0123.,;'\"<|>!éß日🙂\u00a0\u2028\x00\x7f\x85")
    many = ["".join(random.choice(signs) for _ in range(random.randrange(60)))
            for _ in range(5000)]
    for s, a in zip(many, ours(program, path, many)):
        b = hf.encode(s, add_special_tokens=False).ids
        check(a == b, "byte level, random", repr(s), a, b)
    chat(path)
    with open(OUT + "/byte_level.json", "w") as f:
        json.dump({"text": TEXT, "vocab": 400, "merges": merges, "cases":
                   [{"text": s, "ids": i} for s, i in zip(CASES, want)]}, f)


def chat(path):
    """What transformers makes of our files, alone and beside a model."""
    from transformers import AutoTokenizer
    for model in (0, 1):
        if model:
            json.dump({"model_type": "llama", "architectures":
                       ["LlamaForCausalLM"]}, open(path + "/config.json", "w"))
        t = AutoTokenizer.from_pretrained(path)
        bos, eos = t.bos_token_id, t.eos_token_id
        user, assistant, think, unthink = t.convert_tokens_to_ids(
            ["<|user|>", "<|assistant|>", "<think>", "</think>"])
        plain = lambda s: t.encode(s, add_special_tokens=False)
        talk = [{"role": "user", "content": "How do I kill time?"},
                {"role": "assistant", "content":
                 "<think>It is harmless.</think>Read a book."},
                {"role": "user", "content": " And\nthen?"}]
        got = t.apply_chat_template(talk, add_generation_prompt=True,
                                    tokenize=True)
        got = got if isinstance(got, list) else got["input_ids"]
        want = ([bos, user] + plain("How do I kill time?") + [assistant, think]
                + plain("It is harmless.") + [unthink] + plain("Read a book.")
                + [eos, user] + plain(" And\nthen?") + [assistant])
        check(list(got) == want, "chat template", model, got, want)
        check(t.apply_chat_template(talk, tokenize=False) == t.bos_token +
              "<|user|>How do I kill time?<|assistant|><think>It is harmless."
              "</think>Read a book." + t.eos_token + "<|user|> And\nthen?",
              "chat text")
        for s in CASES:
            raw = t.backend_tokenizer.encode(s, add_special_tokens=False).ids
            check(plain(s) == raw, "AutoTokenizer", model, repr(s))


def stories(n):
    """Texts put together from words that tok512 knows well and badly."""
    random.seed(2)
    some = ("Once upon a time there was little girl named Lily She loved to "
            "play outside in park with her mom banana Mississippi zzzz hahaha "
            "naïve café “quoted” don't 1999 日本 🙂 tab\there ... -- !!! <s> "
            "<0x41> the then there thee inin andand").split(" ")
    for _ in range(n):
        yield "".join(random.choice(some) + random.choice(
            [" ", " ", " ", ". ", ", ", "\n", "  ", ""])
            for _ in range(random.randrange(1, 40)))


def pieces(program, folder):
    from tokenizers import Tokenizer
    source, path = REAL + "/tok512.bin", folder + "/pieces"
    subprocess.check_call([program, "save", source, path, "<|user|>",
                           "<|assistant|>", "<think>", "</think>"])
    hf = Tokenizer.from_file(path + "/tokenizer.json")
    encode = llama2c(source)
    strings = CASES + list(stories(2000))
    a, b = ours(program, source, strings), ours(program, path, strings)
    differ = []
    for s, x, y in zip(strings, a, b):
        check(x == encode(s), "llama2.c", repr(s), x, encode(s))
        check(x == y, "bin and json", repr(s), x, y)
        if "<s>" in s or "\u2581" in s:
            continue  # there, Hugging Face sees a special token or a blank
        z = hf.encode(s, add_special_tokens=False).ids
        if x != z:
            differ.append((s, x, z))
        check(hf.decode(z) == s, "decode", repr(s), repr(hf.decode(z)))
    print("tok512: Hugging Face differs in", len(differ), "of", len(strings))
    for s, x, z in differ[:5]:
        print("  ", repr(s)[:70], [hf.id_to_token(i) for i in x][:12],
              [hf.id_to_token(i) for i in z][:12])
    check(not differ, "Hugging Face on tok512")
    chat(path)
    with open(OUT + "/tok512.json", "w") as f:
        json.dump({"cases": [{"text": s, "ids": i} for s, i in
                             zip(strings[:len(CASES) + 20], a)]}, f)


if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        program = driver(folder)
        byte_level(program, folder)
        if os.path.exists(REAL + "/tok512.bin"):
            pieces(program, folder)
    print("disagreements:", bad)
    sys.exit(bad > 0)
