"""Trains a model with TRL on the rows of an arm, as they are.

python3 trl_sft.py MESSAGES.jsonl MODEL OUT [STEPS]

MESSAGES.jsonl comes from `tbr data --form messages`; MODEL is a Hugging Face
directory. Needs trl and datasets. On GPUs, start it with `accelerate launch`.
"""
import sys

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


def main():
    rows, model, out = sys.argv[1:4]
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else -1
    data = load_dataset("json", data_files=rows, split="train")
    options = SFTConfig(
        out, max_steps=steps, num_train_epochs=2, learning_rate=5e-5,
        per_device_train_batch_size=8, bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(), logging_steps=1,
        report_to="none", save_strategy="no")
    trainer = SFTTrainer(model, args=options,
                         train_dataset=data.select_columns(["messages"]))
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main()
