// Stochastic rounding to bfloat16, with random numbers from the counter-based generator Philox4x32-10 (Salmon, Moraes,
// Dror, Shaw, SC 2011). agr_cuda/rounding.py defines which number rounds which element.
//
// U is the unsigned 32-bit integer or, in the CPU kernels, a vector of them; F is float or a vector of float.
#pragma once

#include "numeric.h"

namespace agr {

// The arrays of a parameter that have random numbers of their own: itself and up to 7 state tensors.
constexpr std::uint32_t rounded_arrays = 8;
// The neighbouring elements that share the four words of one counter.
constexpr int elements_of_counter = 8;

// What the random numbers of one tensor in one step depend on, besides the element and the array.
struct RoundingKey {
    std::uint64_t seed;
    std::uint32_t step;
    std::uint32_t index;  // of the parameter
};

template <class U>
struct RandomWords {
    U word[4];
};

// The random words of the counter `block` (its low and high word): those of elements 8 block and up. A GPU's code has
// `unrolled` of the rounds after each other.
template <class U, int unrolled = 10>
AGR_INLINE RandomWords<U> random_words(const RoundingKey& key, std::uint32_t array, U low, U high) {
    U x0 = low, x1 = high;
    U x2 = U{} + key.step;
    U x3 = U{} + (key.index * rounded_arrays + array);
    auto k0 = static_cast<std::uint32_t>(key.seed);
    auto k1 = static_cast<std::uint32_t>(key.seed >> 32);
#if defined(__CUDACC__)
#pragma unroll unrolled
#endif
    for (int round = 0; round < 10; ++round) {
        const U high0 = Product<U>::high(x0, 0xd2511f53u), low0 = x0 * 0xd2511f53u;
        const U high1 = Product<U>::high(x2, 0xcd9e8d57u), low1 = x2 * 0xcd9e8d57u;
        x0 = high1 ^ x1 ^ k0;
        x1 = low1;
        x2 = high0 ^ x3 ^ k1;
        x3 = low0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return {{x0, x1, x2, x3}};
}

// Rounds x up or down by a random number of 16 bits. A finite value stays finite; every NaN becomes 0x7fc0.
template <class U, class F>
AGR_INLINE U rounded_stochastically(F x, U random) {
    const U bits = bit_cast<U>(x);
    const U magnitude_bits = bits & 0x7fffffffu;
    const U moved = (bits + random) >> 16;
    const U finite = (moved & 0x7fffu) == 0x7f80u ? moved - 1u : moved;
    const U infinite = x != x ? U{} + 0x7fc0u : bits >> 16;
    return magnitude_bits >= 0x7f800000u ? infinite : finite;
}

}  // namespace agr
