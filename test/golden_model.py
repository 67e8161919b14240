"""Makes golden/model.safetensors, against which test_model.c compares tbr.

  python3 golden_model.py          needs torch, transformers, safetensors

A tiny Llama (grouped-query, head size other than width / heads) as Hugging
Face transformers computes it, in float64: logits, loss, every gradient, and
every weight after ten steps of torch's AdamW with warm-up, cosine, clipping
and decay on matrices only. golden/model/ is the model as transformers saves
it, so reading it is tested as well.
"""
import math, os
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "golden")
STEPS, WARMUP, LR, LAST, DECAY, CLIP = 10, 3, 1e-2, 0.1, 0.1, 0.7
LENGTHS = [1, 19, 33, 4]


class Norm(modeling_llama.LlamaRMSNorm):
    def forward(self, x):  # transformers goes down to float32 here
        return self.weight * x * torch.rsqrt(
            x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Rotary(modeling_llama.LlamaRotaryEmbedding):
    def forward(self, x, position_ids):  # and here
        size = self.config.head_dim
        frequency = self.config.rope_parameters["rope_theta"] ** (
            -torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = position_ids[..., None].double() * frequency
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


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


def main():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=53, hidden_size=20, intermediate_size=36,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, max_position_embeddings=40, rms_norm_eps=1e-5,
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    modeling_llama.LlamaRMSNorm = Norm
    modeling_llama.LlamaRotaryEmbedding = Rotary
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.3 * torch.randn(p.shape) if p.dim() == 1
                    else torch.randn(p.shape) / math.sqrt(p.shape[1]))
    model.save_pretrained(os.path.join(OUT, "model"))
    model = model.double().eval()
    ids = [torch.randint(0, 53, (n,)).tolist() for n in LENGTHS]
    targets = [[-1 if k % 3 == 1 and n > 1 else (7 * k + n) % 53
                for k in range(n)] for n in LENGTHS]
    keep, logits = {}, []
    loss = loss_of(model, ids, targets, logits)
    loss.backward()
    keep["ids"] = torch.tensor(sum(ids, []))
    keep["targets"] = torch.tensor(sum(targets, []))
    keep["lengths"] = torch.tensor(LENGTHS)
    keep["logits"] = torch.cat(logits)
    keep["loss"] = loss.detach()[None]
    for name, p in model.named_parameters():
        keep["grad." + name] = p.grad.clone()
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
    save_file({k: v.float().contiguous() for k, v in keep.items()},
              os.path.join(OUT, "model.safetensors"))
    print("parameters", sum(p.numel() for p in model.parameters()),
          "losses", losses, "norms", norms)


if __name__ == "__main__":
    main()
