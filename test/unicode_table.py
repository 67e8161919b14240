"""Prints unicode_runs of tbr.c: what tokenizers takes for letters and so on.

  python3 unicode_table.py          (needs tokenizers, unicodedata2)

Letters, numbers and blanks are asked of the package `tokenizers` itself, code
point by code point, since its answer is what has to be met (tokenizers 0.23.3:
its regular expressions are of Unicode 16.0, and Digits of 17.0). What is not
surely in NFC comes from unicodedata2, whose version should not be older.

Between two ~ is a set: runs of code points outside and inside it by turns, from
U+0000 on. A length is written with digits: the last from # to [ is worth 0 to
56, those before it from ] to } are worth 0 to 32, and the first weighs most.
"""
import sys, unicodedata
from tokenizers import Regex, pre_tokenizers

try:
    import unicodedata2 as newest
except ImportError:
    newest = unicodedata
CODES = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
# Where coarse() keeps apart what is in doubt.
COMMON = [(0x80, 0x590), (0x5D0, 0x60F), (0x61B, 0x6D5), (0x109E, 0x1100),
          (0x11C2, 0x135C), (0x1E00, 0x1F70), (0x2002, 0x2FFF),
          (0x3000, 0xA66E), (0xAC00, 0xF8FF), (0xFE00, 0x101FC),
          (0x1D400, 0x1DFFF), (0x1F000, 0x10FFFF)]
LOW, HIGH, FIRST_LOW, FIRST_HIGH = 57, 33, ord("#"), ord("]")


def cut_by(pre_tokenizer):
    """The code points that a pre-tokenizer cuts out of what is around them."""
    return {c for c in CODES
            if len(pre_tokenizer.pre_tokenize_str("<" + chr(c) + ">")) > 1}


def matched(pattern):
    return cut_by(pre_tokenizers.Split(Regex(pattern), "isolated"))


def number(n):
    text = chr(FIRST_LOW + n % LOW)
    n //= LOW
    while n:
        text = chr(FIRST_HIGH + n % HIGH) + text
        n //= HIGH
    return text


def runs(codes):
    text, at, inside = "", 0, False
    while at <= max(codes):
        end = at
        while (end in codes) == inside:
            end += 1
        text += number(end - at)
        at, inside = end, not inside
    return text


def nfc_doubts():
    """What NFC changes, may join with what stands before it, or may move."""
    doubts = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    for c in CODES:
        parts = newest.decomposition(chr(c)).split()
        if newest.normalize("NFC", chr(c)) != chr(c) or newest.combining(chr(c)):
            doubts.add(c)
        elif len(parts) == 2 and parts[0][0] != "<":
            doubts.add(int(parts[1], 16))
    return coarse(doubts)


def coarse(codes):
    """Those and what is between them, except for what is COMMON."""
    wide, last = set(codes), 0x80
    for c in sorted(codes):
        between = range(last + 1, c)
        if len(between) < 8000 and not any(
                low < c and last < high for low, high in COMMON):
            wide.update(between)
        last = c
    return wide


def literal(text, indent="     "):
    """The text as a string of C, in lines of 80 columns; no trigraphs."""
    lines = [text[i:i + 73] for i in range(0, len(text), 73)]
    return "\n".join('%s"%s"' % (indent, line.replace("??", '?" "?'))
                     for line in lines)


if __name__ == "__main__":
    sets = {"letters": matched(r"\p{L}"), "numbers": matched(r"\p{N}"),
            "blanks": matched(r"\s"),
            "digits": cut_by(pre_tokenizers.Digits(individual_digits=True))}
    sets["digits"] -= sets["numbers"]
    for c in CODES:  # an older version knows less, and nothing else
        kind = unicodedata.category(chr(c))
        if kind != "Cn":
            assert (c in sets["letters"]) == (kind[0] == "L"), hex(c)
            assert (c in sets["numbers"]) == (kind[0] == "N"), hex(c)
    sets["doubts"] = nfc_doubts()
    text = ""
    for name, codes in sets.items():
        print(name, len(codes), len(runs(codes)), file=sys.stderr)
        text += runs(codes) + "~"
    print(literal(text[:-1]))
