"""The parameter shapes of the model sets: real models written as generators, and COUNTxELEMENTS.

Order and shapes are those of `model.parameters()` of Hugging Face's GPT-2 (124M) and Llama-3.2-1B and of torchvision's
resnet50 and vit_b_16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelSet:
    """A named list of parameter shapes."""

    name: str  # as --sets takes it
    title: str  # for tables and charts
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        """The number of elements of all tensors together."""
        return sum(map(prod, self.shapes))


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> Iterator[Shape]:
    """GPT-2 with tied embeddings; matrices are stored (in, out), as its Conv1D modules do."""
    yield from ((vocabulary, width), (context, width))
    for _ in range(layers):
        for fan_in, fan_out in ((width, 3 * width), (width, width)):
            if fan_out == 3 * width:
                yield from ((width,), (width,))  # the first layer norm
            yield from ((fan_in, fan_out), (fan_out,))
        yield from ((width,), (width,))  # the second layer norm
        yield from ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    yield from ((width,), (width,))


def resnet50(classes: int = 1000) -> Iterator[Shape]:
    """ResNet-50: bottleneck blocks of 1x1, 3x3 and 1x1 convolutions, each with a batch norm."""

    def convolution(channels_in: int, channels_out: int, kernel: int) -> Iterator[Shape]:
        yield from ((channels_out, channels_in, kernel, kernel), (channels_out,), (channels_out,))

    yield from convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(channels, width, 1)
            yield from convolution(width, width, 3)
            yield from convolution(width, 4 * width, 1)
            if block == 0:
                yield from convolution(channels, 4 * width, 1)  # the shortcut
            channels = 4 * width
    yield from ((classes, channels), (classes,))


def vit_b_16(
    width: int = 768, layers: int = 12, patch: int = 16, tokens: int = 197, classes: int = 1000
) -> Iterator[Shape]:
    """ViT-B/16 for images of 224 by 224 pixels; matrices are stored (out, in)."""
    yield from ((1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width))
    for _ in range(layers):
        yield from ((width,), (width,))
        yield from ((3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,))
        yield from ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
    yield from ((width,), (width,), (classes, width), (classes,))


def llama(
    width: int = 2048,
    layers: int = 16,
    vocabulary: int = 128256,
    heads: int = 32,
    key_value_heads: int = 8,
    intermediate: int = 8192,
) -> Iterator[Shape]:
    """Llama-3.2-1B: tied embeddings, no biases, norms of weights alone; matrices are stored (out, in)."""
    key_value = key_value_heads * (width // heads)
    yield (vocabulary, width)
    for _ in range(layers):
        yield from ((width, width), (key_value, width), (key_value, width), (width, width))  # q, k, v, o
        yield from ((intermediate, width), (intermediate, width), (width, intermediate))  # gate, up, down
        yield from ((width,), (width,))  # the norms before attention and before the MLP, registered after both
    yield (width,)


MODELS: dict[str, tuple[str, Callable[[], Iterator[Shape]]]] = {
    "gpt2": ("GPT-2 124M", gpt2),
    "resnet50": ("ResNet-50", resnet50),
    "vit-b-16": ("ViT-B/16", vit_b_16),
    "llama-3.2-1b": ("Llama-3.2-1B", llama),
}
# Parameters, gradients and all contenders' state would take 200 GB of a machine's memory: to be asked for by name.
LARGE_MODELS = ("llama-3.2-1b",)
_USUAL_MODELS = tuple(name for name in MODELS if name not in LARGE_MODELS)
DEFAULT_SETS = (*_USUAL_MODELS, "321x64", "321x4096")
ALLOWED_SETS = (
    f"{', '.join(_USUAL_MODELS)}, or COUNTxELEMENTS such as 321x64; and where there is memory {', '.join(LARGE_MODELS)}"
)


def model_set(name: str) -> ModelSet:
    """Return the set of that name: a model's, or COUNTxELEMENTS for COUNT tensors of ELEMENTS elements each.

    Raises ValueError, naming the value and what is allowed, for any other name.
    """
    if name in MODELS:
        title, generate = MODELS[name]
        return ModelSet(name, title, tuple(generate()))
    uniform = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if uniform is None:
        raise ValueError(f"unknown set {name!r}: allowed are {ALLOWED_SETS}")
    count, elements = int(uniform[1]), int(uniform[2])
    return ModelSet(name, f"{count:,} tensors of {elements:,}", ((elements,),) * count)
