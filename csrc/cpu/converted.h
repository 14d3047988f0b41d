// Conversions between what is stored and float32: blocks of elements are widened to float32, updated there, and
// narrowed again. Only kernels.cpp includes this file; it is compiled once for each instruction set.
#pragma once

#include "../quantization.h"
#include "../rounding.h"
#include "vector.h"

namespace agr::cpu {
namespace {

// The most elements that are converted together. Their float32 values stay in the first-level cache.
constexpr int converted_elements = 1024;

constexpr int float_lanes = AGR_VECTOR_BYTES / 4;
using Floats = vector<float, float_lanes>;
using Words = vector<std::uint32_t, float_lanes>;

// Calls step(i) for the first element of every vector of n elements, and rest(i, count) for those that are left.
template <class Step, class Rest>
AGR_INLINE void for_vectors(int n, const Step& step, const Rest& rest) {
    int i = 0;
    for (; i + float_lanes <= n; i += float_lanes) step(i);
    if (i < n) rest(i, n - i);
}

template <class Stored>
AGR_INLINE void widen_from(const void* from, int n, float* to) {
    const auto* stored = static_cast<const Stored*>(from);
    for_vectors(
        n, [&](int i) { store(to + i, load<float_lanes>(stored + i)); },
        [&](int i, int count) {
            Stored padded[float_lanes] = {};
            std::memcpy(padded, stored + i, count * sizeof(Stored));
            store(to + i, load<float_lanes>(padded));
        });
}

// `to` has room for converted_elements, of which some past the n are written.
AGR_INLINE void widen(Type type, const void* from, int n, float* to) {
    switch (type) {
        case Type::bfloat16:
            return widen_from<bfloat16>(from, n, to);
        case Type::float16:
            return widen_from<float16>(from, n, to);
        default:
            return widen_from<float>(from, n, to);
    }
}

template <class Stored>
AGR_INLINE void narrow_to(const float* from, int n, void* to) {
    auto* stored = static_cast<Stored*>(to);
    for (; n >= 2 * float_lanes; n -= 2 * float_lanes, from += 2 * float_lanes, stored += 2 * float_lanes)
        store_two(stored, load<float_lanes>(from), load<float_lanes>(from + float_lanes));
    for_vectors(
        n, [&](int i) { store(stored + i, load<float_lanes>(from + i)); },
        [&](int i, int count) {
            float padded[float_lanes] = {};
            Stored narrowed[float_lanes];
            std::memcpy(padded, from + i, count * sizeof(float));
            store(narrowed, load<float_lanes>(padded));
            std::memcpy(stored + i, narrowed, count * sizeof(Stored));
        });
}

AGR_INLINE void narrow(Type type, const float* from, int n, void* to) {
    switch (type) {
        case Type::bfloat16:
            return narrow_to<bfloat16>(from, n, to);
        case Type::float16:
            return narrow_to<float16>(from, n, to);
        default:
            return narrow_to<float>(from, n, to);
    }
}

// Rounds n elements to bfloat16, the first of which is the element `first` of its tensor. `from` has room for
// converted_elements, of which some past the n are read.
AGR_INLINE void narrow_stochastically(const RoundingKey& key, std::uint32_t array, std::int64_t first,
                                      const float* from, int n, void* to) {
    // The numbers of whole counters, of which there may be one more than the elements fill. As 16-bit numbers, the
    // words of a counter are in the order of its elements.
    constexpr int counters =
        (converted_elements / elements_of_counter + 1 + float_lanes - 1) / float_lanes * float_lanes;
    alignas(64) std::uint32_t words[counters][4];
    const std::int64_t first_counter = first / elements_of_counter;
    const int used = static_cast<int>((first + n - 1) / elements_of_counter - first_counter) + 1;
    Words lane{};
    for (int i = 0; i < float_lanes; ++i) lane[i] = i;
    for (int i = 0; i < used; i += float_lanes) {
        const auto begin = static_cast<std::uint64_t>(first_counter + i);
        const Words low = lane + static_cast<std::uint32_t>(begin);
        // The low word of some lanes may have overflowed.
        const Words carry = low < lane ? Words{} + 1u : Words{};
        const auto random = random_words<Words>(key, array, low, carry + static_cast<std::uint32_t>(begin >> 32));
        alignas(64) std::uint32_t by_word[4][float_lanes];
        std::memcpy(by_word, &random, sizeof(by_word));
        for (int k = 0; k < float_lanes; ++k)
            for (int word = 0; word < 4; ++word) words[i + k][word] = by_word[word][k];
    }
    const unsigned char* numbers = reinterpret_cast<unsigned char*>(words) + first % elements_of_counter * 2;
    auto* stored = static_cast<bfloat16*>(to);
    // Some past the n elements are read and have no number of their own.
    auto rounded = [&](int i) {
        return rounded_stochastically<Words>(load<float_lanes>(from + i), load_bits<float_lanes>(numbers + 2 * i));
    };
    for_vectors(
        n, [&](int i) { store_bits<float_lanes>(stored + i, rounded(i)); },
        [&](int i, int count) {
            bfloat16 padded[float_lanes];
            store_bits<float_lanes>(padded, rounded(i));
            std::memcpy(stored + i, padded, count * sizeof(bfloat16));
        });
}

template <bool is_signed>
struct CodeTable {
    float value[codes];
    CodeTable() {
        for (int i = 0; i < codes; ++i) value[i] = code_value<is_signed>(i);
    }
};

template <bool is_signed>
AGR_INLINE void dequantize_as(const std::uint8_t* codes, float scale, int n, float* to) {
    static const CodeTable<is_signed> table;
    for (int i = 0; i < n; ++i) to[i] = table.value[codes[i]] * scale;
}

AGR_INLINE void dequantize(bool is_signed, const void* from, float scale, int n, float* to) {
    const auto* codes = static_cast<const std::uint8_t*>(from);
    return is_signed ? dequantize_as<true>(codes, scale, n, to) : dequantize_as<false>(codes, scale, n, to);
}

template <bool is_signed>
AGR_INLINE void quantize_as(const float* from, int n, std::uint8_t* to, float* scale) {
    // The magnitudes' bits are compared, in whose order NaN comes last.
    Words largest{};
    auto take = [&](Floats x) {
        const Words bits = bit_cast<Words>(x) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    };
    auto padded = [&](int i, int count) {
        Floats x{};
        std::memcpy(&x, from + i, count * sizeof(float));
        return x;
    };
    for_vectors(
        n, [&](int i) { take(load<float_lanes>(from + i)); }, [&](int i, int count) { take(padded(i, count)); });
    std::uint32_t bits = 0;
    for (int lane = 0; lane < float_lanes; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
    const BlockScale block = BlockScale::of(bit_cast<float>(bits));
    auto code = [&](Floats x) { return narrowed_to_8<float_lanes>(code_of<is_signed, Words>(x, block.inverse)); };
    for_vectors(
        n,
        [&](int i) {
            const auto bytes = code(load<float_lanes>(from + i));
            std::memcpy(to + i, &bytes, sizeof(bytes));
        },
        [&](int i, int count) {
            const auto bytes = code(padded(i, count));
            std::memcpy(to + i, &bytes, count);
        });
    *scale = block.stored;
}

AGR_INLINE void quantize(bool is_signed, const float* from, int n, void* to, float* scale) {
    auto* codes = static_cast<std::uint8_t*>(to);
    return is_signed ? quantize_as<true>(from, n, codes, scale) : quantize_as<false>(from, n, codes, scale);
}

}  // namespace
}  // namespace agr::cpu
