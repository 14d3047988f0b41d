"""How numbers are stored and what float32 arithmetic may make of them, in float64 NumPy and independent of the package.

Rounding to bfloat16 at random and codes of 8 bits are written here from their description: as arithmetic where the
package works on bits, and as a table of intervals where the package computes the code. Rounding to nearest is the
oracle's. All of them are monotone: a number that float32 arithmetic found, known to be between two others, is stored
as one that is between those two as stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from oracle import SIXTEEN_BIT, Array

UNIT = 2.0**-24  # float32's rounding is relative to the result
SMALLEST = 2.0**-149  # float32's smallest number


class Approximate(np.lib.mixins.NDArrayOperatorsMixin):
    """A float64 array, and how far from it float32 arithmetic may be. The oracle computes with these as with arrays.

    Every operation hands on its operands' errors, to first order, and adds one rounding, but for what is exact.
    Computed in another order, a result may be a few times farther off.
    """

    def __init__(self, value: Any, error: Any = 0.0) -> None:
        self.value = np.asarray(value, np.float64)
        self.error = error if np.shape(error) == self.value.shape else np.full(self.value.shape, error)

    def __array_ufunc__(self, ufunc: np.ufunc, how: str, *operands: Any) -> Any:
        assert how == "__call__"
        exact = [x.value if isinstance(x, Approximate) else np.float64(x) for x in operands]
        errors = [x.error if isinstance(x, Approximate) else 0.0 for x in operands]
        value = ufunc(*exact)
        if ufunc in (np.equal, np.not_equal):
            return value
        handed_on = _handed_on(ufunc, value, exact, errors)
        unchanged = ufunc is np.multiply and exact[0].ndim == 0 and exact[0] == 1
        rounded = not unchanged and ufunc not in (np.negative, np.absolute, np.maximum)
        rounding = UNIT * np.abs(value) + SMALLEST * (value != 0) if rounded else 0.0
        return Approximate(value, handed_on + rounding)

    def __array_function__(self, function: Callable[..., Any], types: Any, operands: Any, keywords: Any) -> Any:
        result = function(*(x.value if isinstance(x, Approximate) else x for x in operands), **keywords)
        return Approximate(result) if function is np.zeros_like else result

    def sum(self) -> Approximate:
        """In float32, in one of many orders: to a part in a million."""
        return Approximate(self.value.sum(), self.error.sum() + 16 * UNIT * np.abs(self.value).sum())


def _handed_on(ufunc: np.ufunc, value: Array, x: Sequence[Array], errors: Sequence[Any]) -> Any:
    """What the operands' errors make of the result's."""
    if ufunc in (np.add, np.subtract):
        return errors[0] + errors[1]
    if ufunc in (np.negative, np.absolute):
        return errors[0]
    if ufunc is np.maximum:
        return np.maximum(*errors)
    if ufunc is np.multiply:
        return np.abs(x[0]) * errors[1] + np.abs(x[1]) * errors[0]
    if ufunc is np.divide:
        return (errors[0] + np.abs(value) * errors[1]) / np.maximum(np.abs(x[1]) - errors[1], SMALLEST)
    if ufunc is np.sqrt:
        return np.sqrt(x[0] + errors[0]) - np.sqrt(np.maximum(x[0] - errors[0], 0.0))
    assert ufunc is np.power
    assert x[1] == 2
    return 2 * np.abs(x[0]) * errors[0]


# Rounding at random.


def philox(counter: Sequence[Any], key: tuple[int, int]) -> list[Array]:
    """The four words of Philox4x32-10."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    low, bits = np.uint64(0xFFFFFFFF), np.uint64(32)
    for i in range(10):
        k0, k1 = (np.uint64((k + i * weyl) % 2**32) for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        one, other = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (other >> bits) ^ c1 ^ k0, other & low, (one >> bits) ^ c3 ^ k1, one & low
    return [c0, c1, c2, c3]


@functools.lru_cache(64)
def random_bits(count: int, *, seed: int, step: int, index: int, array: int) -> Array:
    """16 random bits for each of the first `count` elements: each block of 8 shares four words, low halves first."""
    blocks = np.arange(-(-count // 8), dtype=np.uint64)
    words = philox((blocks, 0, step, 8 * index + array), (seed % 2**32, seed >> 32))
    halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    return np.stack(halves, axis=1).reshape(-1)[:count]


def round_at_random(x: Array, bits: Array) -> Array:
    """x in bfloat16: away from zero if its rest, in units of the last place, and bits / 2^16 come to 1 or more."""
    precision, smallest_exponent, largest = SIXTEEN_BIT["bfloat16"]
    _, exponent = np.frexp(x)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, smallest_exponent) - (precision - 1))
    magnitude = np.floor(np.abs(x) / unit + bits / 2.0**16) * unit
    return np.where(np.isfinite(x), np.copysign(np.minimum(magnitude, largest), x), x)


# Codes of 8 bits.

BLOCK = 256  # neighbours in memory that share a scale


@functools.cache
def code_table(signed: bool) -> tuple[Array, Array]:
    """For the codes of magnitudes, upwards: where the interval of each begins, and the value in its middle.

    A decade's intervals are of one length, 2^f of them in a decade of f bits; f falls by one from decade to decade.
    """
    most, decades = (6, 6) if signed else (7, 7)
    begins, values = [0.0], [0.0]
    for decade in reversed(range(decades)):
        count = 2 ** (most - decade)
        begins += [10.0**-decade * (0.1 + 0.9 * i / count) for i in range(count)]
        values += [10.0**-decade * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
    # Between 0 and the smallest value in the middle, but for second moments: of them none but 0 becomes 0.
    begins[1] = values[1] / 2 if signed else SMALLEST
    return np.array([*begins, (1 + values[-1]) / 2]), np.array([*values, 1.0])


def code_values(signed: bool) -> Array:
    """What the 256 codes stand for, in units of the scale. The signed: 0, 1, the fractions; then their negatives."""
    values = code_table(signed)[1]
    if not signed:
        return values
    positive = np.concatenate([values[:1], values[-1:], values[1:-1]])
    return np.concatenate([positive, -positive])


def in_code(y: Array, signed: bool) -> Array:
    """y, in units of its scale, as its code has it."""
    begins, values = code_table(signed)
    code = np.searchsorted(begins, np.abs(y), side="right") - 1
    return np.copysign(values[code], y) if signed else values[np.where(y > 0, code, 0)]


def of_blocks(x: Array) -> Array:
    """The largest of each block."""
    return np.maximum.reduceat(x, np.arange(0, x.size, BLOCK)) if x.size else x


def each(scales: Array, count: int) -> Array:
    """The scale of each element."""
    return np.repeat(scales, BLOCK)[:count]
