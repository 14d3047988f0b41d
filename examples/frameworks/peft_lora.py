"""Train the LoRA adapters of a small Llama with peft and AGR-AdamW; `--resume` goes on from the saved adapters.

Needs: pip install agr-cuda peft
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import agr_cuda


def train(
    folder: Path, steps: int, *, resume: bool = False, optimizer: Any = agr_cuda.AdamW, **options: Any
) -> PeftModel:
    """Return the trained model. `options` go to the optimizer; a resumed run needs the same, as `agr` is not saved."""
    set_seed(0)
    tiny = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**tiny, num_attention_heads=2))  # from_pretrained(...), in earnest
    if resume:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    else:
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    # Frozen parameters have no gradient, and would cost nothing; without them, the state dict has adapters alone.
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = optimizer(adapters, lr=1e-2, **options)
    done = 0
    if resume:
        saved = torch.load(folder / "optimizer.pt")
        update.load_state_dict(saved["optimizer"])
        done = saved["steps"]
    for step in range(done, steps):
        tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        update.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        update.step()
    model.save_pretrained(str(folder))
    torch.save({"optimizer": update.state_dict(), "steps": steps}, folder / "optimizer.pt")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="steps in all (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the adapters in runs/peft")
    train(Path("runs/peft"), **vars(parser.parse_args()))
