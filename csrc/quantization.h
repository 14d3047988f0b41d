// State of 8 bits: blocks of scale_block elements, each with one scale, by dynamic tree quantization (arXiv
// 2110.02861).
//
// agr_cuda/quantization.py defines the codes and describes them. Like the update rules, these functions take values of
// a type V, float or a vector of float, and U, the unsigned 32-bit integer or the vector of them, of the same shape.
#pragma once

#include "numeric.h"
#include "step.h"

namespace agr {

constexpr int codes = 256;
constexpr int decades = 7;

// The bits of a code's fraction in the decade from 0.1 to 1.
template <bool is_signed>
constexpr int fraction_bits = is_signed ? 6 : 7;

// Whether the state tensor at this index may be negative, and so has signed codes.
AGR_INLINE constexpr bool is_signed_state(Rule rule, int index) { return rule == Rule::adan ? index != 2 : index == 0; }

// What a code stands for, in units of the scale.
template <bool is_signed>
AGR_INLINE float code_value(int code) {
    if (code == 0) return 0;
    if (code == (is_signed ? 128 : 255)) return 1;
    const int place = is_signed ? code & 127 : code + 1;  // a one bit, and then the fraction
    int bits = 0;
    while (place >> bits > 1) ++bits;
    double decade = 1;
    for (int i = bits; i < fraction_bits<is_signed>; ++i) decade /= 10;
    const int size = 1 << bits;
    const double value = decade * (0.1 + 0.9 * (place - size + 0.5) / size);
    return static_cast<float>(is_signed && code > 128 ? -value : value);
}

// A scale as it is stored, and the factor by which the elements of its block are multiplied before they are coded.
// `largest` is their largest magnitude, or NaN or infinite: then the block is NaN as a whole, and its codes are 0.
struct BlockScale {
    float stored, inverse;

    static AGR_INLINE BlockScale of(float largest) {
        const bool finite = largest - largest == 0;
        const bool invertible = finite && largest >= smallest_normal<float>;
        return {finite ? largest : bit_cast<float>(0x7fc00000u), invertible ? reciprocal(largest) : 0.0f};
    }
};

// The code of x. The order of operations is that of the definition, so that all backends give the same code. Bits above
// the lowest eight are 0.
template <bool is_signed, class U, class V>
AGR_INLINE U code_of(V x, float inverse) {
    constexpr int most = fraction_bits<is_signed>;
    V y = magnitude(x) * inverse;
    y = y > 0.0f ? y : V{};  // not NaN
    V scaled = y;
    V size = V{} + static_cast<float>(1 << most);  // of the decade, in codes
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 1; i < decades; ++i) {
        const auto below = scaled < 0.1f;
        scaled = below ? scaled * 10.0f : scaled;
        size = below ? size * 0.5f : size;
    }
    const V fraction = (scaled - 0.1f) * static_cast<float>(10.0 / 9);
    const V place = size * (1.0f + fraction);
    const V last = size * 2.0f - 1.0f;
    U code = truncated<U>(place < last ? place : last);
    const auto one = y > static_cast<float>(1 - 0.225 / (1 << most));
    if constexpr (is_signed) {
        code = y < 0.275e-6f ? U{} : code;  // half of the smallest value
        const U sign = x < 0.0f ? U{} + 128u : U{};
        const U signed_code = code + (code > 0u ? sign : U{});
        return one & (sign == 0u) ? U{} + 128u : signed_code;
    } else {
        code = code > 2u ? code - 1u : U{} + 1u;
        code = one ? U{} + 255u : code;
        return y > 0.0f ? code : U{};
    }
}

}  // namespace agr
