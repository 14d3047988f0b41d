// State of 8 bits: blocks of scale_block elements, each with one scale, by dynamic tree quantization (arXiv
// 2110.02861).
//
// agr_cuda/quantization.py defines the codes and describes them. Like the update rules, these functions take values of
// a type V, float or a vector of float, and U, the unsigned 32-bit integer or the vector of them, of the same shape.
#pragma once

#include <utility>

#include "numeric.h"
#include "step.h"

namespace agr {

constexpr int codes = 256;

template <bool is_signed>
constexpr int decades = is_signed ? 6 : 7;

// The bits of a code's fraction in the decade from 0.1 to 1.
template <bool is_signed>
constexpr int fraction_bits = is_signed ? 6 : 7;

// Whether the state tensor at this index may be negative, and so has signed codes.
AGR_INLINE constexpr bool is_signed_state(Rule rule, int index) { return rule == Rule::adan ? index != 2 : index == 0; }

// What a code stands for, in units of the scale.
template <bool is_signed>
AGR_INLINE float code_value(int code) {
    const int place = is_signed ? code & 127 : code + 1;  // a one bit, and then the fraction
    const float sign = is_signed && code >= 128 ? -1 : 1;
    if (place == (is_signed ? 0 : 1)) return 0;
    if (place == (is_signed ? 1 : 256)) return sign;
    int bits = 0;
    while (place >> bits > 1) ++bits;
    double decade = 1;
    for (int i = bits; i < fraction_bits<is_signed>; ++i) decade /= 10;
    const int size = 1 << bits;
    const double value = decade * (0.1 + 0.9 * (place - size + 0.5) / size);
    return sign * static_cast<float>(value);
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

// In a decade, the code of y is the whole part of offset + slope y.
struct CodeLine {
    float slope, offset;

    template <bool is_signed>
    static constexpr CodeLine of(int decade) {
        double size = 1 << fraction_bits<is_signed>, power = 1;  // size in codes
        for (int i = 0; i < decade; ++i) {
            size /= 2;
            power *= 10;
        }
        return {static_cast<float>(size * power * 10 / 9), static_cast<float>(size * 8 / 9 - (is_signed ? 0 : 1))};
    }
};
// Constants, lest a GPU computes them.
template <bool is_signed, int decade>
constexpr CodeLine code_line = CodeLine::of<is_signed>(decade);

// The lines meet where decades do, and are the flatter the larger y is: the lowest is that of y's decade.
template <bool is_signed, class V, int... decade>
AGR_INLINE V lowest_line(V y, std::integer_sequence<int, decade...>) {
    V lowest = V{} + (is_signed ? 127.5f : 254.5f);  // below the code that is 1
    ((lowest = smaller_number(
          multiply_add(y, V{} + code_line<is_signed, decade>.slope, V{} + code_line<is_signed, decade>.offset),
          lowest)),
     ...);
    return lowest;
}

// The code of x, by the definition's operations, so that all backends give the same (processors without a fused
// multiply and add: but for one in a million, at the border of two codes). Bits above the lowest eight are 0.
template <bool is_signed, class U, class V>
AGR_INLINE U code_of(V x, float inverse) {
    const V y = larger_number(magnitude(x * inverse), V{});  // not NaN
    const V place = lowest_line<is_signed>(y, std::make_integer_sequence<int, decades<is_signed>>{});
    const auto one = y > static_cast<float>(1 - 0.225 / (1 << fraction_bits<is_signed>));
    if constexpr (is_signed) {
        // Below half of the smallest value, 3.25e-6, which is that of code 2, is 0.
        const U code = truncated<U>(smaller_number(y * static_cast<float>(2 / 1.625e-6), place));
        const U sign = (bit_cast<U>(x) >> 24) & 128u;
        return code > 1u ? (one ? U{} + 1u : code) | sign : U{};
    } else {
        const U code = truncated<U>(larger_number(place, y > 0.0f ? V{} + 1.0f : V{}));
        return one ? U{} + 255u : code;
    }
}

}  // namespace agr
