"""Stochastic rounding to bfloat16: up or down with probabilities that make the expectation exact.

This is the definition, in PyTorch's operations; the backends do the same within their kernels.

Half of a float32's bits are cut off. A random number of 16 bits is added to them first, so that the rest is rounded up
as often as those bits say. The numbers come from the counter-based generator Philox4x32-10 (Salmon, Moraes, Dror, Shaw:
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), which needs no state: a number is a function of the group's
seed, the step, the parameter's index, the array (0 for the parameter, 1 and up for its averages), and the element's
index in the whole tensor, in the order of memory. So the numbers are the same on every backend, and wherever a tensor
is cut. The key of Philox is the seed. Its counter, of four words, is: the element's index divided by 8, low and high
word; the step; and 8 times the parameter's index plus the array. The eight elements share the four words of the result:
element 0 has the low half of the first, element 1 its high half, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = 0xFFFFFFFF
#: The arrays of a parameter that have random numbers of their own: itself and up to 7 averages.
ARRAYS = 8


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10, as int64 tensors, of a counter of four words."""
    x = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(x[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(x[2], _MULTIPLIERS[1])
        x = (high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0)
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW, (k1 + _KEY_INCREMENTS[1]) & _LOW
    return x


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of the product of 32-bit numbers, without overflowing int64."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def random_bits(elements: Tensor, *, seed: int, step: Tensor | float, index: int, array: int) -> Tensor:
    """Return a random number of 16 bits, as int64, for every element.

    Args:
        elements: the indices of the elements in their whole tensor, int64.
        seed: the group's `rounding_seed`.
        step: the number of the step, from 1.
        index: the parameter's index in the optimizer, counted over all groups.
        array: 0 for the parameter, k + 1 for its average number k.
    """
    if isinstance(step, Tensor):
        step = step.reshape(()).to(device=elements.device, dtype=torch.int64)
    block = elements >> 3
    last = torch.full_like(block, index * ARRAYS + array)
    words = philox(
        (block & _LOW, block >> 32, torch.zeros_like(block) + (step if isinstance(step, Tensor) else int(step)), last),
        (seed & _LOW, seed >> 32),
    )
    lane = elements & 7
    word = torch.stack(words).gather(0, (lane >> 1)[None])[0]
    return word >> ((lane & 1) << 4) & 0xFFFF


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Return float32 `values` rounded to bfloat16 with random numbers of 16 bits.

    A finite value stays finite, and NaN stays NaN.
    """
    pattern = values.view(torch.int32).to(torch.int64) & _LOW
    rounded = (pattern + bits) >> 16
    finite = (pattern & 0x7F800000) != 0x7F800000
    rounded = torch.where(finite & ((rounded & 0x7FFF) == 0x7F80), rounded - 1, rounded)
    nan = (pattern & 0x7FFFFFFF) > 0x7F800000
    rounded = torch.where(nan, 0x7FC0, torch.where(finite, rounded, pattern >> 16))
    signed = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded)
    return signed.to(torch.int16).view(torch.bfloat16)
