"""State of 8 bits: codes of blocks of 256 elements with a scale each, as agr_cuda/quantization.py defines them.

Elements come in three dimensions, of which the first counts the blocks that share a scale; a scale is of shape
(blocks, 1, 1). Codes of first moments are signed.
"""

import triton
import triton.language as tl

#: The elements that share a scale.
QUANTIZED = tl.constexpr(256)
SIGNED_DECADES = tl.constexpr(6)
UNSIGNED_DECADES = tl.constexpr(7)


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
    y = tl.where(k == (1 if SIGNED else 256), 1.0, tl.where(k == (0 if SIGNED else 1), 0.0, y))
    return tl.where(code >= 128, -y, y) if SIGNED else y


@triton.jit
def _on_line(y, DECADE: tl.constexpr, SIGNED: tl.constexpr):
    """Return what the code of y is the whole part of, if y is in this decade."""
    size: tl.constexpr = (64.0 if SIGNED else 128.0) / 2.0**DECADE  # in codes
    slope = tl.full(y.shape, size * 10.0**DECADE * 10.0 / 9.0, tl.float32)
    return tl.fma(y, slope, tl.full(y.shape, size * 8.0 / 9.0 - (0.0 if SIGNED else 1.0), tl.float32))


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
    y = x * inverse
    y = tl.maximum(tl.abs(y), 0.0)  # not NaN
    is_one = y > 1.0 - 0.225 / (64.0 if SIGNED else 128.0)
    place = tl.full(y.shape, 127.5 if SIGNED else 254.5, tl.float32)
    for decade in tl.static_range(SIGNED_DECADES if SIGNED else UNSIGNED_DECADES):
        place = tl.minimum(place, _on_line(y, decade, SIGNED))
    if SIGNED:
        # Below half of the smallest value, 3.25e-6, which is that of code 2, is 0.
        code = tl.minimum(place, y * (2.0 / 1.625e-6)).to(tl.int32)
        code = tl.where(code > 1, tl.where(is_one, 1, code) + tl.where(x < 0.0, 128, 0), 0)
    else:
        code = tl.maximum(place, tl.where(y > 0.0, 1.0, 0.0)).to(tl.int32)
        code = tl.where(is_one, 255, code)
    return code.to(tl.uint8), tl.where(finite, largest, float("nan"))
