"""Stochastic rounding to bfloat16, with random numbers from Philox, as agr_cuda/rounding.py defines it."""

import triton
import triton.language as tl


@triton.jit
def random_bits(first, seed, step, array, BLOCK: tl.constexpr):
    """Return a random number of 16 bits for each element of a block, of shape (BLOCK / 256, 32, 8), as uint32.

    Args:
        first: the index of the first element in its whole tensor, a multiple of BLOCK.
        seed: the group's `rounding_seed`.
        step: the number of this step.
        array: 8 times the parameter's index, plus 0 for the parameter or k + 1 for its average number k.
        BLOCK: the number of elements.
    """
    # Eight elements share the four words of one call. Adding to the low word does not carry into the high one.
    eights = tl.arange(0, BLOCK // 256)[:, None, None] * 32 + tl.arange(0, 32)[None, :, None]
    low = (first >> 3).to(tl.uint32) + eights.to(tl.uint32)
    zero = low * 0
    high = zero + (first >> 35).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + array.to(tl.uint32))
    lane = tl.arange(0, 8)[None, None, :]
    word = tl.where(lane < 4, tl.where(lane < 2, word0, word1), tl.where(lane < 6, word2, word3))
    return (word >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def rounded_stochastically(x, bits):
    """Return float32 values rounded to bfloat16. A finite value stays finite, and NaN stays NaN."""
    pattern = x.to(tl.uint32, bitcast=True)
    rounded = (pattern + bits) >> 16
    finite = (pattern & 0x7F800000) != 0x7F800000
    rounded = tl.where((rounded & 0x7FFF) == 0x7F80, rounded - 1, rounded)
    rounded = tl.where(finite, rounded, pattern >> 16)
    rounded = tl.where((pattern & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
