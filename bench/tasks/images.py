"""A residual network and a vision transformer on scikit-learn's handwritten digits: 1,797 images of 8x8 pixels."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tasks.blocks import Block, small_normal
from bench.tasks.task import Batch, Task

BATCH_SIZE, CLASSES, HELD_OUT = 64, 10, 400
CHANNELS = 32
WIDTH, HEADS, LAYERS, PATCH, SIZE = 64, 4, 3, 2, 8


class Residual(nn.Module):
    """Two convolutions beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return what follows x, of shape (batch, channels, height, width)."""
        return F.relu(x + self.layers(x))


def resnet() -> nn.Module:
    """Return a residual network."""
    stem = [nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES)]
    return nn.Sequential(*stem, Residual(), nn.MaxPool2d(2), Residual(), *head)


class Vit(nn.Module):
    """A vision transformer over patches of 2x2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.position = small_normal((SIZE // PATCH) ** 2, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, causal=False) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes."""
        hidden = self.blocks(self.patches(images).flatten(2).transpose(1, 2) + self.position)
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


@functools.cache
def digits() -> Batch:
    """Return the images that are trained on, and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))[HELD_OUT:]
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(found.target)[order]


def batches(seed: int) -> Iterator[Batch]:
    """Yield batches of images and classes, epoch after epoch, each in another order."""
    images, classes = digits()
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.split(torch.randperm(len(images), generator=generator), BATCH_SIZE):
            if len(chosen) == BATCH_SIZE:
                yield images[chosen], classes[chosen]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy of the class, in nats."""
    return F.cross_entropy(model(batch[0]), batch[1])


RESNET_TASK = Task("resnet", "small ResNet, handwritten digits", resnet, batches, loss, lr=3e-3)
VIT_TASK = Task("vit", "small ViT, handwritten digits", Vit, batches, loss, lr=1e-3)
