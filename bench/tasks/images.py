"""A residual network and a vision transformer that recognize handwritten digits: 1,797 images of 8x8 pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tasks import digits
from bench.tasks.blocks import Block, small_normal
from bench.tasks.task import Batch, Task

PATCH = 2


class Residual(nn.Module):
    """Two convolutions beside a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return what follows x, of shape (batch, channels, height, width)."""
        return F.relu(x + self.layers(x))


def resnet_model(channels: int, blocks: int) -> nn.Module:
    """Return a residual network of two stages with as many blocks each."""
    stem = [nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    stages = [[Residual(channels) for _ in range(blocks)] for _ in range(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, digits.CLASSES)]
    return nn.Sequential(*stem, *stages[0], nn.MaxPool2d(2), *stages[1], *head)


class Vit(nn.Module):
    """A vision transformer over patches of 2x2 pixels."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.position = small_normal((digits.SIZE // PATCH) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, digits.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes."""
        hidden = self.blocks(self.patches(images).flatten(2).transpose(1, 2) + self.position)
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


def batches(batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches of images and classes, epoch after epoch, each in another order."""
    images, classes = digits.trained_on()
    for chosen in digits.epochs(batch_size, torch.Generator().manual_seed(seed)):
        yield images[chosen], classes[chosen]


def held_out_batches() -> Sequence[Batch]:
    """Return images that are not trained on, and their classes."""
    return [digits.held_out()]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy of the class, in nats."""
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the share of images whose class is recognized."""
    recognized: Tensor = model(batch[0]).argmax(1) == batch[1]
    return recognized.float().mean()


def resnet(batch_size: int, channels: int, blocks: int, lr: float = 3e-3) -> Task:
    """Return the task of a residual network of these sizes."""
    model, score = partial(resnet_model, channels, blocks), ("accuracy", accuracy)
    data = partial(batches, batch_size), held_out_batches
    return Task("resnet", "ResNet, handwritten digits", model, *data, loss, lr, score)


def vit(batch_size: int, width: int, heads: int, layers: int, lr: float = 1e-3) -> Task:
    """Return the task of a vision transformer of these sizes."""
    model, score = partial(Vit, width, heads, layers), ("accuracy", accuracy)
    data = partial(batches, batch_size), held_out_batches
    return Task("vit", "ViT, handwritten digits", model, *data, loss, lr, score)
