"""Train a perceptron with accelerate, gradient accumulation and AGR-AdamW; `--resume` goes on from the checkpoint.

Needs: pip install agr-cuda accelerate
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import agr_cuda


def train(
    folder: Path, steps: int, *, resume: bool = False, optimizer: Any = agr_cuda.AdamW, **options: Any
) -> nn.Module:
    """Return the trained model. `options` go to the optimizer; a resumed run needs the same, as `agr` is not saved."""
    set_seed(0)
    data = DataLoaderConfiguration(use_seedable_sampler=True)  # the same order of data when a run is resumed
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=data)
    model: nn.Module = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    inputs = torch.randn(2048, 16)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=8, shuffle=True)
    update = optimizer(model.parameters(), lr=1e-2, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(update, start_factor=0.1, total_iters=4)
    model, update, loader, schedule = accelerator.prepare(model, update, loader, schedule)
    if resume:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, 2 * schedule.scheduler.last_epoch)
    for x, y in islice(loader, 2 * (steps - schedule.scheduler.last_epoch)):
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients:  # the last of the two that are accumulated
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            update.step()
            schedule.step()
            update.zero_grad()
    accelerator.save_state(str(folder))
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="steps in all (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in runs/accelerate")
    train(Path("runs/accelerate"), **vars(parser.parse_args()))
