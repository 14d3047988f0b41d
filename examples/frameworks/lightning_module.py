"""Train a perceptron with Lightning and AGR-AdamW; `--resume` goes on from the newest checkpoint.

Needs: pip install agr-cuda lightning
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import agr_cuda


class Classifier(lightning.LightningModule):
    def __init__(self, optimizer: Any = agr_cuda.AdamW, **options: Any) -> None:
        super().__init__()
        self.optimizer, self.options = optimizer, options
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.layers(inputs), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer(self.parameters(), lr=1e-2, **self.options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    folder: Path, epochs: int, *, resume: bool = False, settings: dict[str, Any] | None = None, **options: Any
) -> nn.Module:
    """Return the trained model. `options` go to Classifier, `settings` to Lightning's Trainer."""
    lightning.seed_everything(0)
    inputs = torch.randn(64, 16)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=8)
    model = Classifier(**options)
    checkpoint = ModelCheckpoint(folder, save_last=True)  # after every epoch
    chosen = {"gradient_clip_val": 1.0, "logger": False, **(settings or {})}
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[checkpoint], **chosen)
    trainer.fit(model, loader, ckpt_path="last" if resume else None)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="epochs in all (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in runs/lightning")
    train(Path("runs/lightning"), **vars(parser.parse_args()))
