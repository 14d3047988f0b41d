"""A small denoising diffusion model of handwritten digits: the paper's own setting in little.

Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239: a U-Net predicts
the noise in an image. The schedule is the cosine of Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, eq. 17.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tasks import digits
from bench.tasks.task import Batch, Task

TIMES = 1000
OFFSET = 0.008  # of the schedule
GROUPS = 8


class Residual(nn.Module):
    """Two convolutions beside a residual connection, with the time of the noise between them."""

    def __init__(self, before: int, channels: int, time: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.GroupNorm(GROUPS, before), nn.GroupNorm(GROUPS, channels)
        self.first, self.second = (nn.Conv2d(n, channels, 3, padding=1) for n in (before, channels))
        self.time = nn.Linear(time, channels)
        self.beside = nn.Identity() if before == channels else nn.Conv2d(before, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return what follows x, of shape (batch, channels, height, width), at times of shape (batch, features)."""
        hidden = self.first(F.silu(self.first_norm(x))) + self.time(time)[:, :, None, None]
        added: Tensor = self.beside(x) + self.second(F.silu(self.second_norm(hidden)))
        return added


class UNet(nn.Module):
    """Images of 8x8 and of 4x4 pixels, each with as many residual blocks going down and up."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        wide, time = 2 * channels, 4 * channels
        self.features = channels
        self.time = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.down = nn.ModuleList(Residual(channels, channels, time) for _ in range(blocks))
        self.smaller = nn.Conv2d(channels, wide, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(Residual(wide, wide, time) for _ in range(2 * blocks))
        self.larger = nn.Conv2d(wide, channels, 3, padding=1)
        self.up = nn.ModuleList(Residual(channels if i else wide, channels, time) for i in range(blocks))
        # Without a bias: it would be a tensor of one element, of whose gradient AGR leaves nothing.
        self.norm, self.head = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels, 1, 3, padding=1, bias=False)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """Return the noise in images of shape (batch, 1, 8, 8) at integer times of shape (batch,)."""
        half = self.features // 2
        frequencies = torch.exp(-math.log(TIMES) / half * torch.arange(half, device=times.device))
        angles = times[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        hidden = self.stem(images)
        for block in self.down:
            hidden = block(hidden, time)
        skipped, hidden = hidden, self.smaller(hidden)
        for block in self.middle:
            hidden = block(hidden, time)
        hidden = torch.cat([skipped, self.larger(F.interpolate(hidden, scale_factor=2.0))], 1)
        for block in self.up:
            hidden = block(hidden, time)
        noise: Tensor = self.head(F.silu(self.norm(hidden)))
        return noise


def noisy(images: Tensor, generator: torch.Generator) -> Batch:
    """Return images between -1 and 1 with noise, the times of each one's noise, and the noise."""
    times = torch.randint(TIMES, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    angle = ((times + 1) / TIMES + OFFSET) / (1 + OFFSET) * math.pi / 2
    kept = (angle.cos() / math.cos(OFFSET / (1 + OFFSET) * math.pi / 2)).square().clamp(1e-5, 1)[:, None, None, None]
    return kept.sqrt() * (2 * images - 1) + (1 - kept).sqrt() * noise, times, noise


def batches(batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches of noisy images, epoch after epoch, each in another order and with other noise."""
    images, _ = digits.trained_on()
    generator = torch.Generator().manual_seed(seed)
    for chosen in digits.epochs(batch_size, generator):
        yield noisy(images[chosen], generator)


def held_out_batches() -> Sequence[Batch]:
    """Return images that are not trained on, with noise that is always the same."""
    images, _ = digits.held_out()
    return [noisy(images, torch.Generator().manual_seed(0))]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean square of the predicted noise's error: the simplified objective, eq. 14 of Ho et al."""
    images, times, noise = batch
    return F.mse_loss(model(images, times), noise)


def ddpm(batch_size: int, channels: int, blocks: int, lr: float = 1e-3) -> Task:
    """Return the task of a U-Net of these sizes."""
    data = partial(batches, batch_size), held_out_batches
    return Task("ddpm", "DDPM, handwritten digits", partial(UNet, channels, blocks), *data, loss, lr)
