"""Train a small vision transformer of timm with AGR-AdamW by name, and layer-wise decay of the learning rate.

Needs: pip install agr-cuda timm
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import resume_checkpoint
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import StepLRScheduler
from timm.utils import CheckpointSaver
from torch import nn
from torch.nn import functional as F

import agr_cuda

# Without an underscore: timm takes what is before one for a prefix, so that "agr_adamw" would be its own "adamw".
default_registry.register(OptimInfo("agradamw", agr_cuda.AdamW, "AdamW with AGR", has_betas=True))
default_registry.register(OptimInfo("agradan", agr_cuda.Adan, "Adan with AGR", has_betas=True, num_betas=3))


def train(folder: Path, epochs: int, *, resume: bool = False, optimizer: str = "agradamw", **options: Any) -> nn.Module:
    """Return the trained model. `options` go to the optimizer; a resumed run needs the same, as `agr` is not saved."""
    torch.manual_seed(0)
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", qkv_bias=False, **tiny)
    images = torch.randn(4, 8, 3, 16, 16)
    labels = images[:, :, 0, :2, :2].flatten(2).argmax(2)
    update = create_optimizer_v2(model, optimizer, lr=2e-3, weight_decay=0.05, layer_decay=0.75, **options)
    # timm's schedulers multiply each group's learning rate by its lr_scale. PyTorch's know nothing of it.
    schedule = StepLRScheduler(update, decay_t=30, decay_rate=0.1, warmup_t=2, warmup_lr_init=1e-5)
    folder.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, update, checkpoint_dir=str(folder))
    first = resume_checkpoint(model, str(folder / "last.pth.tar"), update) if resume else 0
    schedule.step(first)
    for epoch in range(first, epochs):
        for x, y in zip(images, labels, strict=True):
            update.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x), y))
            update.step()
        schedule.step(epoch + 1)
        saver.save_checkpoint(epoch)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=40, help="epochs in all (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in runs/timm")
    train(Path("runs/timm"), **vars(parser.parse_args()))
