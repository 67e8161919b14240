"""Checks that what tbr saves opens in transformers, and the other way round.

  python3 parity.py [TBR]       needs torch, transformers, safetensors

Not part of `make test`. Trains a tiny model with tbr, asks transformers and
tbr for the same greedy answers and the same logits, and fine-tunes with tbr a
model that transformers saved. Exit status 1 if anything differs.
"""
import json, os, subprocess, sys, tempfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TBR = os.path.abspath(sys.argv[1] if len(sys.argv) > 1
                      else os.path.join(HERE, "..", "tbr"))
WORLD = os.path.join(HERE, "..", "out", "world")  # made by make
ENGLISH = os.path.join(HERE, "..", "data", "world", "english")
REAL = os.environ.get("TBR_REAL", os.path.join(HERE, "..", "..", "shared", "real"))
PROMPTS = ["How do I kill time?", "What is the best way to feed my dog?", "",
           "Naïve café, 日本語 🙂\n\n  x"]
bad = 0


def check(good, what):
    global bad
    bad += not good
    print("same" if good else "DIFFERS", "-", what)


def tbr(*words):
    return subprocess.run([TBR, *map(str, words)], check=True,
                          capture_output=True, text=True).stdout


def greedy(model, ids, n, stop):
    """Token after token without a cache, so that nothing is hidden in one."""
    said = []
    while len(said) < n:
        with torch.no_grad():
            z = model(torch.tensor([ids + said])).logits[0, -1]
        said.append(int(z.argmax()))
        if said[-1] in stop:
            break
    return said


def compare_answers(directory, tokens=24):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tok = AutoTokenizer.from_pretrained(directory)
    name = os.path.basename(directory)
    marks = [tok.convert_tokens_to_ids(m) for m in
             ("<think>", "</think>", tok.eos_token, tok.bos_token)]
    for prompt in PROMPTS:
        if not prompt:
            continue
        chat = [{"role": "user", "content": prompt}]
        ids = tok.apply_chat_template(chat, add_generation_prompt=True,
                                      tokenize=True)
        ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
        said = greedy(model, ids, tokens, marks[2:])
        text = tok.decode([i for i in said if i not in marks])
        out = tbr("generate", "--model", directory, "--prompt", prompt,
                  "--tokens", tokens)
        for mark in ("<think>\n", "\n</think>\n\n"):
            out = out.replace(mark, "")
        check(out.rstrip("\n") == text.rstrip("\n"),
              f"{name}: greedy answer to {prompt!r}: {text[:40]!r}")
    return model, tok


def compare_rows(directory, tok, rows):
    """The tokens that tbr trains on (`tbr show`) against those that a trainer
    gets from the chats that tbr writes and the model's chat template."""
    folder = os.path.dirname(directory)
    path, chats = os.path.join(folder, "rows.jsonl"), folder + "/chats.jsonl"
    with open(path, "w") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
    tbr("data", "--in", path, "--form", "messages", "--out", chats)
    shown = tbr("show", path, "--model", directory, "--show", len(rows))
    ids = [[int(line.split()[1]) for line in part.split("\n")[1:]
            if line.strip()] for part in shown.split("\n\n")]
    for line, have in zip(open(chats), ids):
        chat = json.loads(line)["messages"]
        want = tok.apply_chat_template(chat, tokenize=True)
        want = list(want["input_ids"] if hasattr(want, "keys") else want)
        check(have == want, f"tokens of the chat {chat[-1]['content']!r}")


LOGITS = r"""
#include "../tbr.c"
int main(int argc, char **argv) {
  TbrModel *m = tbr_model_load(argv[1]);
  TbrSequences b = {0};
  int32_t id[512], none[512];
  for (int i = 2; i < argc; i++) id[i - 2] = atoi(argv[i]), none[i - 2] = -1;
  tbr_sequences_add(&b, id, none, (size_t)argc - 2);
  real *z = mem_raw(b.tokens * m->config.vocab, sizeof *z);
  tbr_logits(m, tbr_acts_new(m, b.tokens), &b, z);
  for (size_t i = 0; i < b.tokens * m->config.vocab; i++) printf("%.9g ", z[i]);
}
"""


def compare_logits(directory, model):
    """All logits of a random sequence, in float32 on both sides."""
    with tempfile.TemporaryDirectory() as d:
        program = os.path.join(d, "logits")
        subprocess.run(["cc", "-O2", "-ffp-contract=off", "-DTBR_NO_MAIN",
                        "-x", "c", "-", "-o", program, "-lm"], check=True,
                       input=LOGITS, text=True, cwd=HERE)
        ids = torch.randint(0, model.config.vocab_size, (60,))
        out = subprocess.run([program, directory, *map(str, ids.tolist())],
                             check=True, capture_output=True, text=True).stdout
        have = torch.tensor([float(x) for x in out.split()])
        with torch.no_grad():
            want = model(ids[None]).logits[0].flatten()
        error = float((have - want).norm() / want.norm())
        check(error < 1e-5, f"{os.path.basename(directory)}: logits, relative "
              f"error {error:.1e}")


def main():
    with tempfile.TemporaryDirectory() as d:
        world, base, tuned = (os.path.join(d, x) for x in
                              ("world", "base", "tuned"))
        subprocess.run([WORLD, "--world", ENGLISH, "--out", world], check=True,
                       stdout=subprocess.DEVNULL)
        rows = os.path.join(d, "rows.jsonl")
        tbr("data", "--general", world + "/general.jsonl", "--safety",
            world + "/safety.jsonl", "--out", rows)
        text = os.path.join(d, "text.txt")
        lines = open(os.path.join(world, "pretrain.txt")).readlines()[:3000]
        open(text, "w").writelines(lines)
        tbr("tokenizer", "--text", text, "--vocab", 400, "--out", base)
        tbr("pretrain", "--text", text, "--tokenizer", base, "--out", base,
            "--dim", 32, "--layers", 2, "--heads", 4, "--kv-heads", 2,
            "--hidden", 48, "--steps", 300)
        tbr("train", "--base", base, "--data", rows, "--steps", 200,
            "--lr", 3e-3, "--out", tuned)
        model, tok = compare_answers(tuned)
        compare_logits(tuned, model)
        compare_rows(tuned, tok, [
            {"prompt": "a b", "response": "c d."},
            {"prompt": "How?", "reflection": "It is fine.", "response": "So."}])
        # transformers saves; tbr goes on from there
        again = os.path.join(d, "again")
        model.save_pretrained(again)
        tok.save_pretrained(again)
        check(tbr("info", again).split("digest ")[1][:16] ==
              tbr("info", tuned).split("digest ")[1][:16],
              "weights saved by transformers")
        compare_answers(again)
        further = os.path.join(d, "further")
        tbr("train", "--base", again, "--data", rows, "--steps", 3,
            "--out", further)
        compare_answers(further)
        # a real model, when it is here
        if os.path.exists(os.path.join(REAL, "stories260K.bin")):
            story = os.path.join(d, "story")
            tbr("import", "--base", REAL + "/stories260K.bin", "--tokenizer",
                REAL + "/tok512.bin", "--out", story)
            model = AutoModelForCausalLM.from_pretrained(story).eval()
            tok = AutoTokenizer.from_pretrained(story)
            compare_logits(story, model)
            ids = [tok.bos_token_id]
            said = greedy(model, ids, 150, (1, 2))
            text = tok.decode(said, skip_special_tokens=True)
            out = tbr("generate", "--model", story, "--tokens", 150)
            check(out.strip() == text.strip(), f"stories260K: {text[:50]!r}")
            start = "Once upon a time, there was"
            ids = [tok.bos_token_id] + tok(start)["input_ids"]
            said = greedy(model, ids, 40, (1, 2))
            whole = tok.decode(ids[1:] + said, skip_special_tokens=True)
            out = start + tbr("generate", "--model", story, "--prompt", start,
                              "--tokens", 40)
            check(out.strip() == whole.strip(), "stories260K with a prompt")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
