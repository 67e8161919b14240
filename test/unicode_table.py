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
# Where marks are common; where coarse() keeps apart what is in doubt.
# Letters that NFC joins with one of these marks stand in tbr.c, too.
MARKS = [(0x5B0, 0x5C2), (0x64B, 0x652), (0x900, 0x109F),
         (0x1780, 0x17DD)]
COMMON = [(0x80, 0x590), (0x5B0, 0x5F4), (0x61B, 0x6D5), (0x900, 0x10FF),
          (0x11C2, 0x1713), (0x1735, 0x18A8), (0x1E00, 0x1F70), (0x2002, 0x2FFF), (0x3000, 0xA66E),
          (0xAC00, 0xF8FF), (0xFE00, 0x101FC), (0x1D400, 0x1DFFF),
          (0x1F000, 0x10FFFF)]
JOINED = [(0x928, 0x93C), (0x930, 0x93C), (0x933, 0x93C), (0xB92, 0xBD7),
          (0x1025, 0x102E)]
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


def nfc_sets():
    """Marks that are certainly in NFC behind a letter, from U+0E00 on behind
    any sign, or behind a mark with no higher code point of the same 128; and
    what may not be in NFC."""
    doubts = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    marks = {c for c in CODES if newest.combining(chr(c))}
    firsts = {}
    for c in CODES:
        parts = newest.decomposition(chr(c)).split()
        if newest.normalize("NFC", chr(c)) != chr(c):
            doubts.add(c)
        elif len(parts) == 2 and parts[0][0] != "<":
            one, two = (int(part, 16) for part in parts)
            firsts.setdefault(two, set()).add(one)
            marks.add(two)
    every_first = set().union(*firsts.values())
    is_letter = lambda c: newest.category(chr(c))[0] == "L"
    fine = {c for c in marks - doubts - every_first
            if any(low <= c <= high for low, high in MARKS)
            and not any(is_letter(one) or c >= 0xE00 for one in
                        firsts.get(c, ()) if (one, c) not in JOINED)}
    for c in sorted(fine):  # the rarer ones that are out of order go
        if any(newest.combining(chr(b)) > newest.combining(chr(c)) > 0
               for b in fine if b < c and b >> 7 == c >> 7):
            fine.discard(c)
    return fine, coarse((doubts | marks) - fine)


def coarse(codes):
    """Those and what is between them, except for what is COMMON."""
    wide, last = set(codes), 0x80
    for c in sorted(codes):
        between = range(last + 1, c)
        if len(between) < 4000 and not any(
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
    sets["marks"], sets["doubts"] = nfc_sets()
    text = ""
    for name, codes in sets.items():
        print(name, len(codes), len(runs(codes)), file=sys.stderr)
        text += runs(codes) + "~"
    print(literal(text[:-1]))
