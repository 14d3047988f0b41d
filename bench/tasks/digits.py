"""The handwritten digits that tasks are about: 1,797 images of 8x8 pixels, in ten classes.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0: its test set, which scikit-learn brings too. They are stored here as one
picture, since a machine with a GPU may have neither scikit-learn nor a network.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor

FILE = Path(__file__).with_name("digits.npz")
SIZE, CLASSES, BRIGHTEST = 8, 10, 16
HELD_OUT = 400

Images = tuple[Tensor, Tensor]  # of shape (images, 1, SIZE, SIZE), between 0 and 1; and their classes


@functools.cache
def read() -> Images:
    """Return all images in an order that is always the same, those that are held out first."""
    with numpy.load(FILE) as found:
        pixels, classes = (torch.from_numpy(found[name]) for name in ("pixels", "classes"))
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    return (pixels.float()[:, None] / BRIGHTEST)[order], classes.long()[order]


def trained_on() -> Images:
    """Return the images that are trained on."""
    images, classes = read()
    return images[HELD_OUT:], classes[HELD_OUT:]


def held_out() -> Images:
    """Return the images that are not trained on."""
    images, classes = read()
    return images[:HELD_OUT], classes[:HELD_OUT]


def epochs(batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the places of a batch's images among those trained on, epoch after epoch, each in another order."""
    count = len(trained_on()[0])
    while True:
        for chosen in torch.split(torch.randperm(count, generator=generator), batch_size):
            if len(chosen) == batch_size:
                yield chosen
