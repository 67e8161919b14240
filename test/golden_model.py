"""Makes the golden models, against which test_model.c compares tbr.

  python3 golden_model.py          needs torch, transformers, safetensors

Tiny models as Hugging Face transformers computes them, in float64. golden/NAME
is the model as transformers saves it, so reading it is tested as well;
golden/NAME.safetensors has logits, loss and every gradient. NAME is
  model    a Llama (grouped-query, head size other than width / heads); and
           every weight after ten steps of torch's AdamW with warm-up, cosine,
           clipping and decay on matrices only
  qwen2    biases of q, k, v; in two shards, in BF16
  llama3   Llama 3's scaled rotary embedding, in F16
"""
import math, os, types
from unittest import mock
import torch
from safetensors.torch import save_file
from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "golden")
STEPS, WARMUP, LR, LAST, DECAY, CLIP = 10, 3, 1e-2, 0.1, 0.1, 0.7
LENGTHS = [1, 19, 33, 4]


def norm(self, x):
    return self.weight * x * torch.rsqrt(
        x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotary(self, x, position_ids):
    angle = position_ids[..., None].double() * self.inv_freq
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def in_double(model):
    """The model in float64, also where transformers goes down to float32: in
    norms, and in rotary embedding, whose formulas are transformers' still."""
    model.double().eval()
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = types.MethodType(norm, part)
        if type(part).__name__.endswith("RotaryEmbedding"):
            formula = part.compute_default_rope_parameters
            if part.rope_type != "default":
                formula = ROPE_INIT_FUNCTIONS[part.rope_type]
            with mock.patch.object(torch, "float", torch.float64):
                part.inv_freq = formula(part.config)[0]
            assert part.inv_freq.dtype == torch.float64
            part.forward = types.MethodType(rotary, part)
    return model


def randomize(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape) + (not name.endswith("bias"))
                    if p.dim() == 1
                    else torch.randn(p.shape) / math.sqrt(p.shape[1]))


def loss_of(model, ids, targets, logits=None):
    """The mean loss over all targets that count; each sequence alone."""
    total, count = 0, 0
    for i, t in zip(ids, targets):
        z = model(torch.tensor([i])).logits[0]
        if logits is not None:
            logits.append(z.detach())
        t = torch.tensor(t)
        total = total + torch.nn.functional.cross_entropy(
            z, t, ignore_index=-1, reduction="sum")
        count += int((t >= 0).sum())
    return total / count


def rate(step):
    if step < WARMUP:
        return (step + 1) / WARMUP
    x = (step - WARMUP) / (STEPS - WARMUP)
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * x)) / 2


def first_step(model, ids, targets):
    """Logits, loss and gradients of a model in float64, and their input."""
    keep, logits = {}, []
    loss = loss_of(model, ids, targets, logits)
    loss.backward()
    keep["ids"] = torch.tensor(sum(ids, []))
    keep["targets"] = torch.tensor(sum(targets, []))
    keep["lengths"] = torch.tensor([len(i) for i in ids])
    keep["logits"] = torch.cat(logits)
    keep["loss"] = loss.detach()[None]
    for name, p in model.named_parameters():
        keep["grad." + name] = p.grad.clone()
    return keep


def sequences(vocab, lengths):
    ids = [torch.randint(0, vocab, (n,)).tolist() for n in lengths]
    targets = [[-1 if k % 3 == 1 and n > 1 else (7 * k + n) % vocab
                for k in range(n)] for n in lengths]
    return ids, targets


def write(name, keep):
    save_file({k: v.float().contiguous() for k, v in keep.items()},
              os.path.join(OUT, name + ".safetensors"))


def small(name, model, dtype, shard):
    """One step of another family, as tiny as can be."""
    randomize(model)
    model.to(dtype).save_pretrained(os.path.join(OUT, name),
                                    max_shard_size=shard)
    ids, targets = sequences(model.config.vocab_size, [9, 30])
    write(name, first_step(in_double(model), ids, targets))


def main():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=53, hidden_size=20, intermediate_size=36,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, max_position_embeddings=40, rms_norm_eps=1e-5,
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    model = LlamaForCausalLM(config)
    randomize(model)
    model.save_pretrained(os.path.join(OUT, "model"))
    model = in_double(model)
    ids, targets = sequences(53, LENGTHS)
    keep = first_step(model, ids, targets)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for _, p in named if p.dim() > 1],
          "weight_decay": DECAY},
         {"params": [p for _, p in named if p.dim() == 1],
          "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.98), eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(step)
        optimizer.zero_grad()
        loss = loss_of(model, ids, targets)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(
            model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    keep["losses"], keep["norms"] = torch.tensor(losses), torch.tensor(norms)
    for name, p in model.named_parameters():
        keep["after." + name] = p.detach()
    write("model", keep)
    print("parameters", sum(p.numel() for p in model.parameters()),
          "losses", losses, "norms", norms)
    tiny = dict(vocab_size=11, hidden_size=6, intermediate_size=5,
                num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=40,
                rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=[2, 3],
                attn_implementation="sdpa")
    small("qwen2", Qwen2ForCausalLM(Qwen2Config(
        tie_word_embeddings=True, rope_parameters={
            "rope_type": "default", "rope_theta": 1000.0}, head_dim=4,
        **tiny)), torch.bfloat16, 300)
    small("llama3", LlamaForCausalLM(LlamaConfig(
        tie_word_embeddings=False, rope_parameters={
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0,
            "low_freq_factor": 1.0, "high_freq_factor": 3.0,
            "original_max_position_embeddings": 20}, head_dim=10,
        **tiny)), torch.float16, "1GB")


if __name__ == "__main__":
    main()
