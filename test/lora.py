"""Compares tbr's LoRA with PEFT's on PyTorch.

  python3 lora.py [MODEL]         needs torch, transformers, peft
  python3 lora.py --golden        makes golden/adapter, for test_model.c

Not part of `make test`. On small random models, and on MODEL, a directory: the
logits and the gradient of every tensor of an adapter that PEFT saved, the
losses of twenty steps of AdamW, and the logits behind them: of the adapter as
tbr saves it, in PEFT, and merged into the base by tbr. Exit status 1 if
anything differs. MODEL is compared in double precision, since in single the
activations of real models, of which few are huge, leave errors above the bound.
"""
import json, os, subprocess, sys, tempfile, warnings
warnings.filterwarnings("ignore")
import torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
       "down_proj"]
LENGTHS, STEPS, DECAY, CLIP = [33, 1, 60, 18], 20, 0.1, 1.0
bad = 0
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()

DRIVER = r"""
#include "../tbr.c"
/* driver ADAPTER DATA OUT SAVED RATE: DATA has ids and targets of sequences; writes
 * logits, gradients, losses and logits of the merged model, a number a line */
static TbrSequences read_data(const char *path) {
  TbrSequences s = {0};
  Json *json = json_read(path);
  for (const Json *row = json->child; row; row = row->next) {
    int32_t id[2][512];
    size_t n = 0;
    const Json *target = row->child->next->child;
    for (const Json *i = row->child->child; i; i = i->next) {
      id[0][n] = (int32_t)i->number;
      id[1][n++] = (int32_t)target->number;
      target = target->next;
    }
    tbr_sequences_add(&s, id[0], id[1], n);
  }
  return s;
}
static void put(FILE *f, const real *x, size_t n) {
  for (size_t i = 0; i < n; i++) fprintf(f, "%.9g\n", (double)x[i]);
}
static void put_logits(FILE *f, const TbrModel *m, TbrActs *acts,
                       const TbrSequences *s) {
  size_t n = s->tokens * m->config.vocab;
  real *z = mem_raw(n, sizeof *z);
  tbr_logits(m, acts, s, z);
  put(f, z, n);
  free(z);
}
int main(int argc, char **argv) {
  if (argc < 6) return 2;
  TbrModel *m = lora_read(argv[1], 1);
  TbrSequences s = read_data(argv[2]);
  FILE *f = fopen(argv[3], "w");
  TbrActs *acts = tbr_acts_new(m, s.tokens);
  real *grad = mem_new(m->adapter->n_params, sizeof *grad);
  size_t counted = 0;
  for (size_t i = 0; i < s.n; i++) counted += count_targets(&s, i);
  put_logits(f, m, acts, &s);
  tbr_loss(m, acts, &s, grad, 1.0 / (double)counted);
  for (size_t i = 0; i < m->adapter->n_tensors; i++) {
    const TbrTensor *t = &m->adapter->tensor[i];
    fprintf(f, "%s\n", t->name);
    put(f, grad + t->at, t->rows * t->columns);
  }
  TbrTraining o = {.steps = 20, .batch = s.n, .rows = 100, .lr = atof(argv[5]),
                   .last = 1, .beta1 = 0.9, .beta2 = 0.98, .eps = 1e-8,
                   .decay = 0.1, .clip = 1};
  fprintf(f, "losses\n");
  Trainer t = trainer_start(m, &s, &o, NULL);
  for (size_t i = 0; i < o.steps; i++) {
    size_t tokens;
    fprintf(f, "%.9g\n", train_step(&t, &tokens));
  }
  tbr_model_save(m, argv[4], 1, 2, NULL);
  fprintf(f, "merged\n");
  put_logits(f, tbr_model_load(argv[4]), acts, &s);
  return fclose(f);
}
"""


def check(error, bound, what):
    global bad
    good = error <= bound
    bad += not good
    print(f"{'same' if good else 'DIFFERS'} - {what}: {error:.1e}")


def relative(have, want):
    size = float(want.double().norm())
    return float((have.double() - want.double()).norm()) / max(size, 1e-30)


def small(directory, heads, kv_heads, tied, dtype):
    torch.manual_seed(heads)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=53, hidden_size=40, intermediate_size=72,
        num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=10,
        max_position_embeddings=64, tie_word_embeddings=tied,
        initializer_range=0.15))
    model.to(dtype).save_pretrained(directory)


def loss_of(model, rows):
    total, count = 0, 0
    for ids, targets in rows:
        z = model(torch.tensor([ids])).logits[0]
        t = torch.tensor(targets)
        total = total + torch.nn.functional.cross_entropy(
            z, t, ignore_index=-1, reduction="sum")
        count += int((t >= 0).sum())
    return total / count


def logits_of(model, rows):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0].flatten()
                          for ids, _ in rows])


def run_driver(program, adapter, rows, folder, rate):
    data, out = folder + "/data.json", folder + "/out.txt"
    with open(data, "w") as f:
        json.dump(rows, f)
    subprocess.run([program, adapter, data, out, folder + "/saved", str(rate)],
                   check=True)
    parts, name = {"logits": []}, "logits"
    for line in open(out):
        if line[0].isalpha() and line[:3] not in ("nan", "inf"):
            name = line.strip()
            parts[name] = []
        else:
            parts[name].append(float(line))
    return {k: torch.tensor(v) for k, v in parts.items()}


def compare(base, program, rank, alpha, targets, folder, deviation, rate,
            dtype=torch.float32):
    """An adapter made by PEFT, its matrices all random, in both."""
    what = f"{os.path.basename(base)}, rank {rank}, {len(targets)} targets"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    vocab = model.config.vocab_size
    torch.manual_seed(5)
    model = get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets)).eval()
    model.peft_config["default"].base_model_name_or_path = base
    trained = [(n.replace(".default", ""), p)
               for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in trained:
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape) * deviation)
    adapter = os.path.join(folder, "adapter")
    model.save_pretrained(adapter)
    model.to(dtype)
    rows = [[torch.randint(0, vocab, (n,)).tolist(),
             [-1 if k % 3 == 1 else (7 * k + n) % vocab for k in range(n)]]
            for n in LENGTHS]
    have = run_driver(program, adapter, rows, folder, rate)
    check(relative(have["logits"], logits_of(model, rows)), 1e-5,
          what + ": logits of PEFT's adapter")
    loss_of(model, rows).backward()
    assert len(have) == len(trained) + 3
    worst = max(relative(have[n], p.grad.flatten()) for n, p in trained)
    check(worst, 1e-4, what + ": the gradient that is worst")
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=rate,
                                  betas=(0.9, 0.98), eps=1e-8,
                                  weight_decay=DECAY)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], CLIP)
        optimizer.step()
        losses.append(loss.item())
    error = (have["losses"] - torch.tensor(losses)) / torch.tensor(losses)
    check(float(error.abs().max()), 1e-4,
          what + f": {STEPS} losses, {losses[0]:.3f} to {losses[-1]:.3f}")
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = PeftModel.from_pretrained(again, folder + "/saved").eval().to(dtype)
    want = logits_of(model, rows)
    check(relative(logits_of(again, rows), want), 1e-3,
          what + ": logits of what tbr trained and saved, in PEFT")
    check(relative(have["merged"], logits_of(again, rows)), 1e-5,
          what + ": logits of the merged model")


def golden():
    """An adapter on golden/model, with its logits and gradients."""
    os.chdir(HERE)
    model = AutoModelForCausalLM.from_pretrained("golden/model")
    torch.manual_seed(6)
    model = get_peft_model(model, LoraConfig(
        r=3, lora_alpha=5, target_modules=["v_proj", "o_proj", "gate_proj"]))
    named = [(n.replace(".default", ""), p)
             for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for _, p in named:
            p.copy_(0.3 * torch.randn(p.shape))
    model.save_pretrained("golden/adapter")
    os.remove("golden/adapter/README.md")
    model.double()
    ids = torch.randint(0, 53, (23,)).tolist()
    rows = [[ids, [(7 * k) % 53 for k in ids]]]
    loss_of(model, rows).backward()
    keep = {n: p.grad.float().contiguous() for n, p in named}
    keep["logits"] = logits_of(model, rows).float()
    keep["ids"] = torch.tensor(ids).float()
    save_file(keep, "golden/adapter.safetensors")


def main():
    with tempfile.TemporaryDirectory() as d:
        program = os.path.join(d, "driver")
        for name, flags in ((program, []), (program + "2", ["-DTBR_DOUBLE"])):
            subprocess.run(["cc", "-O2", "-march=native", "-ffp-contract=off",
                            "-DTBR_NO_MAIN", *flags, "-x", "c", "-", "-o", name,
                            "-lm"], check=True, input=DRIVER, text=True,
                           cwd=HERE)
        for heads, kv_heads, tied, dtype in (
                (4, 2, True, torch.float32), (4, 4, False, torch.bfloat16),
                (8, 2, False, torch.float16)):
            base = os.path.join(d, f"small-{heads}-{kv_heads}-{dtype}")
            small(base, heads, kv_heads, tied, dtype)
            for rank, alpha, targets in ((8, 16, ALL), (1, 3, ["o_proj"]),
                                         (16, 16, ["up_proj", "v_proj"])):
                compare(base, program, rank, alpha, targets, d, 0.05, 1e-2)
        if len(sys.argv) > 1:
            base = os.path.abspath(sys.argv[1])
            compare(base, program + "2", 8, 16, ALL, d, 0.005, 1e-4,
                    torch.float64)
    sys.exit(bad > 0)


if __name__ == "__main__":
    golden() if sys.argv[1:] == ["--golden"] else main()
