"""State of 8 bits: codes of blocks of 256 elements with a scale each, as agr_cuda/quantization.py defines them.

Elements come in three dimensions, of which the first counts the blocks that share a scale; a scale is of shape
(blocks, 1, 1). Codes of first moments are signed.
"""

import triton
import triton.language as tl

#: The elements that share a scale.
QUANTIZED = tl.constexpr(256)
DECADES = tl.constexpr(7)


@triton.jit
def decoded(codes, SIGNED: tl.constexpr):
    """Return what codes stand for in units of their scale, to one unit in the last place of float32.

    With k = 2^b + f, for the fraction f of b bits, a value 10^-E (0.1 + 0.9 (f + 1/2) / 2^b) is a whole number,
    18 k + 9 - 16 2^b, times 5^b / (2 10^(E + b + 1)); E + b is the number of bits in the first decade. The exponent of
    k as a float is b.
    """
    code = codes.to(tl.int32)
    k = code & 127 if SIGNED else code + 1
    number = k.to(tl.float32)
    pattern = number.to(tl.int32, bitcast=True)
    power = (pattern & 0x7F800000).to(tl.float32, bitcast=True)
    b = (pattern >> 23) - 127
    five = tl.where((b & 1) != 0, 5.0, 1.0) * tl.where((b & 2) != 0, 25.0, 1.0) * tl.where((b & 4) != 0, 625.0, 1.0)
    y = (number * 18.0 + 9.0 - power * 16.0) * five * (0.5e-7 if SIGNED else 0.5e-8)
    y = tl.where(code == (128 if SIGNED else 255), 1.0, tl.where(code == 0, 0.0, y))
    return tl.where(code > 128, -y, y) if SIGNED else y


@triton.jit
def quantized(x, SIGNED: tl.constexpr):
    """Return the codes and the scales of float32 values."""
    # As whole numbers, patterns of float32 are in the order of magnitudes, and infinity and NaN are the largest.
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    pattern = tl.max(tl.max(magnitudes, 2, keep_dims=True), 1, keep_dims=True)
    largest = pattern.to(tl.float32, bitcast=True)
    finite = pattern < 0x7F800000
    usable = finite & (pattern >= 0x00800000)  # a normal number
    one = tl.full(largest.shape, 1.0, tl.float32)
    inverse = tl.where(usable, tl.div_rn(one, tl.where(usable, largest, one)), 0.0)
    y = tl.abs(x) * inverse
    y = tl.where(y > 0.0, y, 0.0)  # not NaN
    size = tl.full(y.shape, 64.0 if SIGNED else 128.0, tl.float32)  # of the decade, in codes
    is_one = y > 1.0 - 0.225 / (64.0 if SIGNED else 128.0)
    in_decade = y
    for _ in tl.static_range(DECADES - 1):
        below = in_decade < 0.1
        in_decade = tl.where(below, in_decade * 10.0, in_decade)
        size = tl.where(below, size * 0.5, size)
    code = size * (1.0 + (in_decade - 0.1) * (10.0 / 9.0))
    code = tl.minimum(code, 2.0 * size - 1.0).to(tl.int32)
    if SIGNED:
        code = tl.where(y < 0.275e-6, 0, code)  # half of the smallest value
        code = tl.where(x < 0.0, tl.where(code > 0, code + 128, code), tl.where(is_one, 128, code))
    else:
        code = tl.where(is_one, 255, tl.where(y > 0.0, tl.maximum(code - 1, 1), 0))
    return code.to(tl.uint8), tl.where(finite, largest, float("nan"))
