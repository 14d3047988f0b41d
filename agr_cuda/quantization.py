"""State of 8 bits: blocks of 256 elements, each with one scale, by dynamic tree quantization (arXiv 2110.02861).

This is the definition, in PyTorch's operations; the backends do the same within their kernels.

Only contiguous tensors have codes, so that a block's elements are neighbours in every order that they may be copied in.

An element x of a block is stored as a code of y = |x| / scale, where the scale is the largest |x| of the block. A code
has some leading zero bits (the decade E of y), a one bit, and the bits f of a linear fraction within that decade, in
the middle of its interval: y = 10^-E (0.1 + 0.9 (f + 1/2) / 2^bits). Codes of first moments have a sign bit and 7 more
bits; those of second moments have no sign and one more bit of fraction. Two codes are special: 0 is 0, and the code for
which no decade is left is 1, so that the largest element is kept exactly.

Signed codes are a sign and a magnitude, so that -x is stored as exactly as x. In the paper's tree they are not: its 256
values have no -1, and the largest element of a block, if it is negative, would lose 0.7% in every step, to which an
average with beta adds up, 40% with 0.99. Here the magnitude with the one bit last, 1, is 1, and the smallest decade,
which had that one value, is left out.

A second moment that is not 0 gets a code that is not 0. It divides a step, and would make a step of any size if it
vanished while the first moment, which is larger than its square, did not.

A block with an infinite element or NaN has a scale of NaN, and is NaN as a whole. A block whose largest element is
denormal has no reciprocal of its scale to multiply by, and becomes 0. (Where the processor is told to flush denormal
numbers, neither has one whose largest element is above 2^126.)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

#: The number of neighbouring elements, in the order of memory, that share a scale.
BLOCK = 256


def _decades(signed: bool) -> int:
    """Return the number of decades."""
    return 6 if signed else 7


def _fraction_bits(signed: bool) -> int:
    """Return the bits of fraction in the decade from 0.1 to 1."""
    return 6 if signed else 7


@functools.cache
def code_values(signed: bool) -> tuple[float, ...]:
    """Return what each of the 256 codes stands for, in units of the scale."""
    most = _fraction_bits(signed)
    fractions: list[float] = []
    for bits in range(most - _decades(signed) + 1, most + 1):
        decade = 10.0 ** (bits - most)
        fractions += [decade * (0.1 + 0.9 * (f + 0.5) / 2**bits) for f in range(2**bits)]
    if signed:
        positive = 0.0, 1.0, *fractions
        return (*positive, *(-value for value in positive))
    return (0.0, *fractions, 1.0)


@functools.cache
def _lines(signed: bool) -> list[tuple[float, float]]:
    """Return slope and offset, as float32 has them, of the code in every decade, as a function of y."""
    sizes = [2.0 ** (_fraction_bits(signed) - decade) for decade in range(_decades(signed))]  # in codes
    exact = [(size * 10**decade * 10 / 9, size * 8 / 9 - (not signed)) for decade, size in enumerate(sizes)]
    return [tuple(line) for line in torch.tensor(exact, dtype=torch.float32).tolist()]


def scale_count(elements: int) -> int:
    """Return the number of scales of a tensor with this many elements."""
    return -(-elements // BLOCK)


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a view of a dense tensor's elements, in one dimension, in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the codes (uint8, in the values' shape and memory layout) and the float32 scales of dense `values`.

    A decade's codes are the whole parts of a line. These lines meet where decades do, and are the flatter the larger y
    is, so that the lowest of all is that of y's decade. Product and sum are rounded once, as in the kernels.
    """
    flat = in_memory_order(values.detach()).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    scales = torch.where(largest.isfinite(), largest, torch.nan)
    tiny = torch.finfo(torch.float32).tiny
    inverse = torch.where(largest.isfinite() & (largest >= tiny), 1 / largest, 0.0)
    y = blocks * inverse[:, None]
    magnitude = torch.where(y.isnan(), 0.0, y.abs())
    one = magnitude > 1 - 0.225 / 2 ** _fraction_bits(signed)
    place = torch.full_like(y, 127.5 if signed else 254.5)
    for slope, offset in _lines(signed):
        place = torch.minimum(place, (magnitude.double() * slope + offset).float())
    if signed:
        # Below half of the smallest value, 3.25e-6, which is that of code 2, is 0.
        code = torch.minimum(place, magnitude * (2 / 1.625e-6)).to(torch.int32)
        code = torch.where(code > 1, torch.where(one, 1, code) + 128 * (y < 0), 0)
    else:
        code = torch.maximum(place, (magnitude > 0).float()).to(torch.int32)
        code = torch.where(one, 255, code)
    codes = torch.empty_like(values, dtype=torch.uint8, memory_format=torch.preserve_format)
    in_memory_order(codes).copy_(code.reshape(-1)[: values.numel()])
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the float32 values of dense `codes`, in their shape and memory layout."""
    table = torch.tensor(code_values(signed), dtype=torch.float32, device=codes.device)
    flat = table[in_memory_order(codes).long()]
    flat = flat * scales.repeat_interleave(BLOCK)[: flat.numel()]
    values = torch.empty_like(codes, dtype=torch.float32, memory_format=torch.preserve_format)
    in_memory_order(values).copy_(flat)
    return values
