"""Compares tbr's tokenizers with Hugging Face's, kind by kind.

  python3 parity_tokenizers.py [TOKENIZER...]     also compares these files or folders
  QUICK=1 python3 parity_tokenizers.py            2,000 random strings instead of 100,000

Trains a small tokenizer of each kind on a mix of scripts, code and emoji, and
compares the ids of that text, of its lines and of random strings; says how
fast both are on a megabyte, on one thread. With GOLDEN=1, writes the small
files of golden/tokenizers that test_files.c reads, and does no more. Exit status 1 if anything
differs. Needs the package tokenizers.
"""
import json, os, random, subprocess, sys, tempfile, time, unicodedata

HERE = os.path.dirname(os.path.abspath(__file__))
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models,
                        normalizers, pre_tokenizers, trainers)

MANY = 2000 if os.environ.get("QUICK") else 100000
TIKTOKEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SCRIPTS = """The quick brown fox didn't jump over the lazy dogs' 12,345.67 beds.
I'LL say: WE'RE here, you've 3 cats'S and 1e10 dogs; it'd be he'll've.
Größe, naïve café, déjà vu, Ångström, Dvořák, İstanbul, Việt Nam đẹp lắm.
Съешь же ещё этих мягких французских булок, да выпей чаю. 1999 год.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Հայաստան. საქართველო 5 ლარი.
敏捷的棕色狐狸跳过懒狗。我喜欢学习中文,价格是100元!日本語のテキスト、カタカナ。
다람쥐 헌 쳇바퀴에 타고파. 안녕하세요 여러분 3시에 만나요.
نص عربي بسيط للتجربة، كِتَابٌ مُقَدَّس ١٢٣٤. שלום עולם, בְּרֵאשִׁית. اردو میں لکھا ہوا۔
यह हिन्दी में एक वाक्य है। लड़का बड़ा हो गया, ज़रूर १२३. বাংলা ভাষা আমার মায়ের।
தமிழ் மொழி இனிது. ಕನ್ನಡ ನಾಡು. മലയാളം ഭാഷ. తెలుగు భాష. ਪੰਜਾਬੀ ਬੋਲੀ. ગુજરાતી.
ภาษาไทยอยู่ที่นี่ ราคา ๑๐๐ บาท ก็ดี. ພາສາລາວ ຢູ່ນີ້. မြန်မာဘာသာစကား သည်။ ភាសាខ្មែរ. አማርኛ ቋንቋ።
🙂🙃 👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️ 1️⃣ ✨→∑∫√∞ ½ ² Ⅷ ① 𝓗𝓮𝓵𝓵𝓸 𝟙𝟚 – — „so“ «oui» …
def f(x, *a, **k):\n\tif x >= 10_000: return {'a': [x**2, 0xFF], "b": a}\n    # TODO
#include <stdio.h>\r\nint main(void) {\r\n  printf("%d\\n", 42);\r\n}\r\n\r\n\r\n
<div class="a b">&nbsp;</div>   \t\t  \n\n   \n x = y  +  z ;  // 100%
https://example.org/a/b?c=1&d=2#e user.name+tag@host.co.uk $9.99 C++ #hash @you
"""
SIGNS = list("aabestrlvmdESTRLVMDſ'''   \t\n\n\r0123459.,;:!?-_\"<>|(){}éßñÅ"
             "日本語漢字한국어яжЖαω١२๑½Ⅷ²①𝓗𝟙🙂👍🏽\u200d\ufe0f\u00a0\u2028\u3000\x85\x0b"
             "\x0c\x1c\x00\x7f\u200b\ufeff่ू์กัा़ি\u0301\u1161\u0374\ufffd\u30ab")
bad = 0


def note(good, *what):
    global bad
    if not good:
        bad += 1
        if bad < 20:
            print("DIFFERS:", *what)


def mixed(size):
    """About so many bytes of all that, in paragraphs of several kinds."""
    random.seed(3)
    lines = SCRIPTS.replace("\\n", "\n").replace("\\t", "\t").split("\n")
    english = [word for line in lines[:2] for word in line.split(" ")]
    words = [word for line in lines for word in line.split(" ")]
    text, length = [], 0
    while length < size:
        kind = random.random()
        pool = english if kind < .5 else words
        part = (random.choice(lines) if kind > .7 else
                " ".join(random.choice(pool) for _ in range(30))) + "\n"
        text.append(part)
        length += len(part.encode())
    return "".join(text)


def any_string():
    """Characters that matter, or of any kind, or words with odd blanks."""
    n = random.randrange(1, 40)
    kind = random.randrange(4)
    if kind == 0:
        return "".join(random.choice(SIGNS) for _ in range(n))
    if kind == 1:
        codes = (random.randrange(0x11FFFF) for _ in range(n))
        return "".join(chr(c if c < 0x10FFFF else c % 0x3000) for c in codes
                       if not 0xD800 <= c % 0x10FFFF < 0xE000
                       and not 0xD800 <= c < 0xE000)
    if kind == 2:
        low = random.choice([0, 0x80, 0x300, 0x590, 0x900, 0xE00, 0x1100,
                             0x1D00, 0x2000, 0x3000, 0xA640, 0x10000, 0x1E000])
        return "".join(chr(random.randrange(low, low + 0x200)) + random.choice(
            ["", " ", "a", "1"]) for _ in range(n // 2 + 1))
    words = SCRIPTS.split(" ")
    return "".join(random.choice(words) + random.choice(
        [" ", " ", "  ", "\n", "", "<tool>", "<too", "'s", " 12345"])
        for _ in range(n // 4 + 1))


def byte_level(pre, special=("<|end|>", "<|start|>"), **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trainer


def tiktoken(numbers):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(TIKTOKEN.replace("NUMBERS", numbers)),
                             "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def in_pieces():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>",
                                     fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=2500, show_progress=False, max_token_length=12,
        special_tokens=["<unk>", "<s>", "</s>"] +
        ["<0x%02X>" % i for i in range(256)])
    return tokenizer, trainer


def kinds():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    yield "gpt2", *byte_level(level)
    yield "digits", *byte_level(pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), level]))
    yield "llama3", *byte_level(tiktoken(r"\p{N}{1,3}"), ignore_merges=True)
    qwen, trainer = byte_level(tiktoken(r"\p{N}"))
    qwen.normalizer = normalizers.NFC()
    yield "qwen", qwen, trainer
    yield "pieces", *in_pieces()


def trained(name, tokenizer, trainer, text, folder):
    words = ([text] if name != "pieces" else  # whole lines make odd tokens
             text.replace("\n", " ").split(" "))
    tokenizer.train_from_iterator(words, trainer)
    path = os.path.join(folder, name + ".json")
    tokenizer.save(path)
    file = json.load(open(path))
    if name == "llama3":  # words that merges don't make, but that are tokens
        for word in (" 12345", " lazy dog", " quickest"):
            word = word.replace(" ", "Ġ")
            file["model"]["vocab"].setdefault(word, len(file["model"]["vocab"]))
    if name == "pieces":  # the byte tokens are no special ones
        file["added_tokens"] = file["added_tokens"][:3]
    if name in ("qwen", "digits"):  # merges as text, and ids in any order
        file["model"]["merges"] = [" ".join(m) for m in file["model"]["merges"]]
        items = list(file["model"]["vocab"].items())
        random.shuffle(items)
        file["model"]["vocab"] = dict(items)
    json.dump(file, open(path, "w"))
    tokenizer = Tokenizer.from_file(path)
    if name != "gpt2":
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in
                              ("<tool>", "<too", "<tool>x", "1<tool>")])
        tokenizer.save(path)
    return path


def ours(program, path, strings):
    got = subprocess.run([program, path], capture_output=True, check=True,
                         input="\n".join(map(json.dumps, strings)).encode())
    return got.stdout.decode(errors="replace").split("\n")[:-1]


def compare(name, program, path, text):
    file = path if path.endswith(".json") else path + "/tokenizer.json"
    tokenizer = Tokenizer.from_file(file)
    random.seed(5)
    strings = [text] + text.split("\n") + [any_string() for _ in range(MANY)]
    normal = tokenizer.normalizer is not None and name == "qwen"
    if name == "pieces":  # there, tbr keeps that apart from a blank
        strings = [s.replace("▁", "_") for s in strings]
    if normal:  # the lines that are not refused
        lines = [unicodedata.normalize("NFC", s) for s in text.split("\n")]
        strings[0] = "\n".join(
            line for line, ids in zip(lines, ours(program, path, lines))
            if not ids.startswith("refused"))
    refused = in_vain = 0
    got = ours(program, path, strings)
    note(len(got) == len(strings), name, "lines", len(got), len(strings))
    want = tokenizer.encode_batch(strings, add_special_tokens=False)
    for string, mine, theirs in zip(strings, got, want):
        if normal and mine.startswith("refused"):
            refused += 1
            in_vain += unicodedata.normalize("NFC", string) == string
            continue
        if normal:
            note(tokenizer.normalizer.normalize_str(string) == string,
                 name, "is not NFC", ascii(string))
        changed = mine.startswith("~")
        mine = [int(i) for i in mine.lstrip("~").split()]
        note(mine == theirs.ids, name, ascii(string[:60]), mine[:20],
             theirs.ids[:20])
        if not normal and changed:
            note(tokenizer.decode(theirs.ids) != string, name, "decode",
                 ascii(string[:60]))
    speed(name, program, path, tokenizer, strings[0], len(strings),
          "%d refused, %d in vain" % (refused, in_vain) if normal else "")


def speed(name, program, path, tokenizer, text, count, more):
    with tempfile.NamedTemporaryFile("w", newline="") as file:
        file.write(text)
        file.flush()
        out = subprocess.run([program, path, file.name], capture_output=True,
                             check=True).stdout.split()
    best = 1e9
    for _ in range(3):
        began = time.time()
        tokenizer.encode(text, add_special_tokens=False)
        best = min(best, time.time() - began)
    began = time.time()
    Tokenizer.from_file(path if path.endswith(".json")
                        else path + "/tokenizer.json")
    print("%-10s %7d strings; a megabyte: %.3f s, tokenizers %.3f s, ratio "
          "%.2f; loading %.3f s, tokenizers %.3f s  %s" %
          (name, count, float(out[1]), best, best / float(out[1]),
           float(out[0]), time.time() - began, more), flush=True)


def golden(folder, text):
    """A small tokenizer of each kind, and what it makes of some strings."""
    where = os.path.join(HERE, "golden", "tokenizers")
    os.makedirs(where, exist_ok=True)
    random.seed(7)
    strings = SCRIPTS.split("\n")[:-1] + [any_string() for _ in range(60)]
    strings = [unicodedata.normalize("NFC", s).replace("▁", "_")
               for s in strings]
    cases = {"texts": strings}
    for name, tokenizer, trainer in kinds():
        trainer.vocab_size = 600 if name == "pieces" else 340
        path = trained(name, tokenizer, trainer, SCRIPTS, folder)
        tokenizer = Tokenizer.from_file(path)
        cases[name] = [tokenizer.encode(s, add_special_tokens=False).ids
                       for s in strings]
        with open("%s/%s.json" % (where, name), "w") as out:
            json.dump(json.load(open(path)), out, separators=(",", ":"))
    with open(where + "/cases.json", "w") as out:
        json.dump(cases, out, separators=(",", ":"))


if __name__ == "__main__":
    text = mixed(1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        program = folder + "/tokens"
        subprocess.check_call(
            ["cc", "-std=c99", "-O3", "-march=native", "-w", "-fopenmp",
             "-ffp-contract=off", "-DTBR_NO_MAIN", HERE + "/tokens.c", "-o",
             program, "-lm"])
        if os.environ.get("GOLDEN"):
            golden(folder, text)
            sys.exit()
        for name, tokenizer, trainer in kinds():
            path = trained(name, tokenizer, trainer, text[:200000], folder)
            compare(name, program, path, text)
        for path in sys.argv[1:]:
            compare(os.path.basename(path), program, path, text)
    print("disagreements:", bad)
    sys.exit(bad > 0)
