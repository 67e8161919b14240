"""What bench.sh compares tbr with, or files of random weights for that.

bench_peer.py train-NAME THREADS      trains a Llama of transformers on the
                                      CPU; prints tokens/s and the peak memory
                                      in MiB
bench_peer.py evaluate-NAME THREADS   the same of its answers to prompts, 32
                                      at a time
bench_peer.py decode-NAME DIR      writes a llama2.c checkpoint and tokenizer
bench_peer.py llmc DIR             writes what llm.c's train_gpt2 reads
"""
import array
import os
import random
import struct
import sys

# dim, layers, heads, key-value heads, hidden, vocab; then batch, window, steps
TRAIN = {
    "train-default": (96, 3, 4, 4, 256, 1536, 8, 96, 40),
    "train-288": (288, 6, 6, 6, 768, 4096, 4, 256, 4),
    "train-768": (768, 12, 12, 12, 2048, 32000, 4, 256, 1),
    "train-smollm2": (576, 30, 9, 3, 1536, 49152, 4, 256, 2),
}
# the same; then prompts, new tokens, tokens of a prompt
EVALUATE = {"evaluate-smollm2": (576, 30, 9, 3, 1536, 49152, 450, 96, 48)}
DECODE = {  # dim, layers, heads, hidden, vocab
    "decode-15M-1": (288, 6, 6, 768, 32000),
    "decode-110M-1": (768, 12, 12, 2048, 32000),
}


def model_of(dim, layers, heads, kv_heads, hidden, vocab):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden,
        num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=512,
        tie_word_embeddings=True))


def report(tokens, spent):
    import resource
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{tokens / spent:.1f} {memory:.0f}")


def train(shape, threads):
    import time

    import torch

    *dims, batch, window, steps = shape
    torch.set_num_threads(threads)
    model = model_of(*dims)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, dims[-1], (batch, window))
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    report(batch * window * steps, time.perf_counter() - start)


def evaluate(shape, threads):
    """Only some of the prompts, since all batches take the same time."""
    import time

    import torch

    *dims, _, tokens, length = shape
    torch.set_num_threads(threads)
    model = model_of(*dims).eval()
    ids = torch.randint(3, dims[-1], (32, length))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        for new in 1, tokens:  # once to warm up
            start = time.perf_counter()
            model.generate(ids, attention_mask=mask, do_sample=False,
                           min_new_tokens=new, max_new_tokens=new,
                           pad_token_id=0)
    report(32 * (tokens + length - 1), time.perf_counter() - start)


def noise(f, n, scale=0.02):
    """n random floats; one block of them over and over."""
    block = array.array("f", (random.gauss(0, scale) for _ in range(65537)))
    while n > 0:
        f.write(block[:n].tobytes())
        n -= len(block)


def llama2c(shape, name, directory):
    dim, layers, heads, hidden, vocab = shape
    with open(os.path.join(directory, name + ".bin"), "wb") as f:
        f.write(struct.pack("<7i", dim, hidden, layers, heads, heads, vocab,
                            512))
        noise(f, vocab * dim + layers * (2 * dim + 4 * dim * dim +
                                         3 * dim * hidden) +
              dim + 512 * dim // heads)
    with open(os.path.join(directory, "tokenizer.bin"), "wb") as f:
        f.write(struct.pack("<i", 8))
        for i in range(vocab):
            word = b" " if i == 259 else b"%06d" % i
            f.write(struct.pack("<fi", -i, len(word)) + word)


def llmc(directory):
    wide, layers, heads, vocab = 768, 12, 12, 50257
    padded, context = 50304, 1024
    with open(os.path.join(directory, "gpt2_124M.bin"), "wb") as f:
        header = [20240326, 3, context, vocab, layers, heads, wide, padded]
        f.write(struct.pack("<256i", *header, *[0] * (256 - len(header))))
        noise(f, padded * wide + context * wide +
              layers * (12 * wide * wide + 13 * wide) + 2 * wide)
    data = os.path.join(directory, "dev", "data", "tinyshakespeare")
    os.makedirs(data, exist_ok=True)
    for part in "train", "val":
        n = 20000
        with open(os.path.join(data, f"tiny_shakespeare_{part}.bin"),
                  "wb") as f:
            f.write(struct.pack("<256i", 20240520, 1, n, *[0] * 253))
            f.write(array.array("H", (random.randrange(vocab)
                                      for _ in range(n))).tobytes())


if __name__ == "__main__":
    what, where = sys.argv[1:3]
    if what in TRAIN:
        train(TRAIN[what], int(where))
    elif what in EVALUATE:
        evaluate(EVALUATE[what], int(where))
    elif what in DECODE:
        llama2c(DECODE[what], what, where)
    else:
        llmc(where)
