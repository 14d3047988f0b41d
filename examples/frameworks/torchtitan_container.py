"""Train with torchtitan's optimizer container, schedule and checkpoints, and AGR-AdamW; `--resume` goes on.

Its Trainer, which is for GPUs, makes the same calls. Needs: pip install agr-cuda torchtitan
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

import agr_cuda


class Optimizers(OptimizersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config): ...  # build() makes an object of the class that this one is in

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        ours = {"AGR-AdamW": agr_cuda.AdamW, "AGR-Adan": agr_cuda.Adan}
        return ours.get(name) or OptimizersContainer._resolve_optimizer_factory(name)


def train(folder: Path, steps: int, *, resume: bool = False, optimizer: str = "AGR-AdamW", **options: Any) -> nn.Module:
    """Return the trained model. `options` go to the optimizer; a resumed run needs the same, as `agr` is not saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    given = {"lr": 1e-2, "weight_decay": 0.1, **options}
    group = ParamGroupConfig(pattern=r".*", optimizer_name=optimizer, optimizer_kwargs=given)
    optimizers = Optimizers.Config(param_groups=[group]).build(model_parts=[model])
    schedules = LRSchedulersContainer.Config(warmup_steps=4).build(optimizers=optimizers, training_steps=1000)
    parts = {"model_parts": [model], "optimizers": optimizers, "lr_schedulers": schedules, "dataloader": None}
    settings = CheckpointManager.Config(enable=True, interval=4, keep_latest_k=0)
    checkpointer = settings.build(**parts, states={}, sd_adapter=None, base_folder=str(folder))
    if resume:
        checkpointer.load()
    for step in range(schedules.schedulers[0].last_epoch + 1, steps + 1):
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizers.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(inputs), inputs[:, :4].argmax(1)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        schedules.step()
        checkpointer.save(step)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="steps in all (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in runs/torchtitan")
    train(Path("runs/torchtitan"), **vars(parser.parse_args()))
