"""Train a small Llama with the Trainer of transformers and AGR-AdamW; `--resume` goes on from the newest checkpoint.

Needs: pip install agr-cuda "transformers[torch]"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import agr_cuda


def train(
    folder: Path,
    steps: int,
    *,
    resume: bool = False,
    optimizer: type[torch.optim.Optimizer] = agr_cuda.AdamW,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Return the trained model. `options` go to the optimizer, `settings` are more of TrainingArguments'."""
    set_seed(0)
    tiny = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**tiny, num_attention_heads=2, attention_dropout=0.1))
    texts = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(64, (64, 16))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=50,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        weight_decay=0.1,  # of matrices: Trainer makes a second group, of biases and norms, without
        max_grad_norm=1.0,  # the default: Trainer clips, whatever the optimizer does
        report_to="none",
        **settings or {},
    )
    # The learning rate is given here: TrainingArguments' reaches only the optimizers that Trainer knows by name.
    choice = optimizer, {"lr": 1e-3, **options}
    Trainer(model, arguments, train_dataset=texts, optimizer_cls_and_kwargs=choice).train(resume_from_checkpoint=resume)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="steps in all (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in runs/transformers")
    train(Path("runs/transformers"), **vars(parser.parse_args()))
