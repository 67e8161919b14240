"""Compares the dialogues of tbr with transformers' apply_chat_template.

  python3 templates.py [TBR] [MODEL...]     needs transformers and tokenizers

Not part of `make test`, which has a few of its results in test_train.c. For
each chat template, as its model has it, makes a small tokenizer with the
special tokens that it needs, and compares what `tbr show` prints with what
transformers makes of the same chat, token by token, and the part that the loss
doesn't count with what transformers would generate from. Then the same of
templates that are chosen with --template, and of what tbr saves with such a
one. MODEL is a Hugging Face directory with a template of its own. Exit status 1
if anything differs.
"""
import json, os, subprocess, sys, tempfile
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TBR = os.path.abspath(sys.argv[1] if len(sys.argv) > 1
                      else os.path.join(HERE, "..", "tbr"))
DATE = "26 Jul 2024"
TEXT = ("How do I kill time? Read a book, or take a walk. The user asks, the "
        "assistant answers; this system is a helpful AI assistant. Below is an "
        "instruction that describes a task. So this is harmless.\n") * 3
ROWS = [
    {"prompt": "How do I kill time?", "response": "Read a book."},
    {"prompt": "How do I kill time?", "response": "Read a book.",
     "reflection": "'Kill' means to pass it. So this is harmless."},
    {"prompt": "  Naïve café,\n\n日本語 🙂\n", "response": "Oui.\n"},
    {"prompt": "x", "response": "\n- one\n- two"},
    {"prompt": "x", "response": "- one\n- two", "reflection": "y\nz"},
    {"prompt": "12 + 30?", "response": "42"},
    {"prompt": "Why?", "response": "Why not?"}]

CHATML = ("{% for message in messages %}%s{{'<|im_start|>' + message['role'] + "
          "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if "
          "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SYSTEM = ("{% if loop.first and messages[0]['role'] != 'system' %}{{ "
          "'<|im_start|>system\n%s<|im_end|>\n' }}{% endif %}")
SMOLLM = ("You are a helpful AI assistant named SmolLM, trained by Hugging "
          "Face")
# As published with Qwen2.5, Llama 3, TinyLlama and so on; of what calls tools,
# only the beginning.
TEMPLATE = {
    "smollm2": CHATML.replace("%s", SYSTEM.replace("%s", SMOLLM)),
    "chatml": CHATML.replace("%s", ""),
    "qwen": r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "llama3.1": r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages"
    " %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if "
    "loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ "
    "content }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' "
    "%}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif "
    "message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ "
    "'<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if "
    "loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif "
    "%}\n{% endfor %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = "
    "messages[1:] %}{% set system_message = messages[0]['content'] %}{% else "
    "%}{% set loop_messages = messages %}{% set system_message = false %}{% "
    "endif %}{% for message in loop_messages %}{% if loop.index0 == 0 and "
    "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = "
    "message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ "
    "bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif "
    "message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + "
    "eos_token }}{% endif %}{% endfor %}",
    "alpaca": "{{ 'Below is an instruction that describes a task. Write a "
    "response that appropriately completes the request.\n\n' }}{% for message in"
    " messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\n' + "
    "message['content'] + '\n\n' }}{% else %}{{ '### Response:\n' + "
    "message['content'] + eos_token }}{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"}
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                 "<|end_header_id|>", "<|eot_id|>"]
# The special tokens of each, with its BOS and EOS.
TOKENS = {
    "smollm2": (CHATML_TOKENS, "<|im_start|>", "<|im_end|>"),
    "chatml": (CHATML_TOKENS + ["<think>", "</think>"], "<|im_start|>",
               "<|im_end|>"),
    "qwen": (CHATML_TOKENS, None, "<|im_end|>"),
    "llama3.1": (LLAMA3_TOKENS, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3": (LLAMA3_TOKENS, "<|begin_of_text|>", "<|eot_id|>"),
    "zephyr": (["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "llama2": (["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "alpaca": (["<|endoftext|>"], None, "<|endoftext|>")}
bad = 0


def check(good, *what):
    global bad
    bad += not good
    print("same" if good else "DIFFERS", "-", *what)


def tbr(*words):
    done = subprocess.run([TBR, *map(str, words)], capture_output=True,
                          text=True, errors="replace")
    if done.returncode:
        sys.exit(f"tbr {words} says: {done.stderr}")
    return done.stdout


def special(id, name):
    return {"id": id, "content": name, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True}


def byte_level(folder, names):
    """A tokenizer as `tbr tokenizer` makes it, but with these special tokens
    behind its own text instead of tbr's marks."""
    with open(folder + "/text.txt", "w") as f:
        f.write(TEXT)
    tbr("tokenizer", "--text", folder + "/text.txt", "--vocab", 400, "--out",
        folder)
    path = folder + "/tokenizer.json"
    t = json.load(open(path))
    marks = [a["content"] for a in t["added_tokens"]]
    text = [k for k in t["model"]["vocab"] if k not in marks]
    vocab = {k: i for i, k in enumerate(text + names)}
    t["model"]["vocab"] = {k: vocab[k] for k in text}
    t["added_tokens"] = [special(vocab[n], n) for n in names]
    json.dump(t, open(path, "w"))


def pieces(folder, names):
    """A tokenizer as Llama 2's: the whole text is one word."""
    t = Tokenizer(models.BPE(byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                         normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    t.train_from_iterator([w.replace("\n", "")
                           for w in TEXT.replace(" ", " \0").split("\0")],
                          trainer)
    made = json.loads(t.to_str())
    vocab = {n: i for i, n in enumerate(names)}
    for i in range(256):
        vocab[f"<0x{i:02X}>"] = len(vocab)
    for k in sorted(made["model"]["vocab"], key=made["model"]["vocab"].get):
        vocab[k] = len(vocab)
    made["model"]["vocab"] = vocab
    made["added_tokens"] = [special(i, n) for i, n in enumerate(names)]
    json.dump(made, open(folder + "/tokenizer.json", "w"))


def config(folder, name, template):
    tokens, bos, eos = TOKENS[name]
    made = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos,
            "eos_token": eos, "clean_up_tokenization_spaces": False}
    if template:
        made["chat_template"] = template
    json.dump(made, open(folder + "/tokenizer_config.json", "w"))


def chat(row):
    said = row["response"]
    if "reflection" in row:
        said = f"<think>\n{row['reflection']}\n</think>\n\n{said}"
    return [{"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": said}]


def ids_of(tok, turns, **more):
    got = tok.apply_chat_template(turns, tokenize=True, date_string=DATE, **more)
    return list(got["input_ids"] if hasattr(got, "keys") else got)


def rendered(tok, **more):
    return [tok.apply_chat_template(chat(row), tokenize=False, date_string=DATE,
                                    **more) for row in ROWS]


def compare(folder, what, tok, rows, *more):
    """What `tbr show` prints, and what transformers feeds."""
    out = tbr("show", rows, "--tokenizer", folder, "--show", len(ROWS), *more)
    parts = out.split(f"{rows}, example ")[1:]
    for row, part in zip(ROWS, parts):
        lines = [line.split() for line in part.split("\n")[1:] if line.strip()]
        have = [int(line[1]) for line in lines]
        asks = [int(line[1]) for line in lines if line[2] == "-"]
        want = ids_of(tok, chat(row))
        begin = ids_of(tok, chat(row)[:1], add_generation_prompt=True)
        check(have == want, what, "whole", repr(row["response"]))
        if have != want:
            print(tok.convert_ids_to_tokens(have), "should be",
                  tok.convert_ids_to_tokens(want), sep="\n")
        # An answer that begins with white space may share a token with what is
        # before it.
        if not row["response"][:1].isspace():
            check(asks == begin, what, "prompt", repr(row["prompt"]))


def saved(folder, name, base, rows, want):
    """tbr saves a template that transformers renders as the model's own."""
    out = os.path.join(folder, "trained")
    shape = ["--dim", 8, "--layers", 1, "--heads", 1, "--kv-heads", 1,
             "--hidden", 8, "--window", 8, "--context", 512, "--steps", 1]
    tbr("pretrain", "--text", rows, "--tokenizer", base, "--out",
        folder + "/pretrained", *shape)
    tbr("train", "--base", folder + "/pretrained", "--data", rows, "--template",
        name, "--steps", 1, "--out", out)
    tok = AutoTokenizer.from_pretrained(base)
    tok.chat_template = open(out + "/chat_template.jinja").read()
    if "llama" not in name: # whose messages lose white space at their ends
        check(rendered(tok) == want, name, "saved template")
        compare(out, name + ", saved", tok, rows)
    stop = json.load(open(out + "/generation_config.json"))["eos_token_id"]
    check(stop == tok.eos_token_id, name, "stops at", tok.eos_token)


with tempfile.TemporaryDirectory() as d:
    rows = d + "/rows.jsonl"
    with open(rows, "w") as f:
        for row in ROWS:
            f.write(json.dumps(row) + "\n")
    for name, template in TEMPLATE.items():
        own, base = f"{d}/{name}", f"{d}/{name}-base"
        for folder in (own, base):
            os.mkdir(folder)
            make = pieces if name in ("zephyr", "llama2") else byte_level
            make(folder, TOKENS[name][0])
            config(folder, name, template if folder == own else None)
        tok = AutoTokenizer.from_pretrained(own)
        compare(own, name, tok, rows)
        compare(base, "--template " + name, tok, rows, "--template", name)
        saved(own, name, base, rows, rendered(tok))
    for folder in sys.argv[2:]:
        compare(folder, folder, AutoTokenizer.from_pretrained(folder), rows)
sys.exit(bad > 0)
