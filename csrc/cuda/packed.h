// Packed elements: the 8 or 16 bytes of neighbouring elements of a tensor that a thread loads or stores at once.
#pragma once

#include <algorithm>

#include "../rounding.h"
#include "format.h"
#include "intrinsics.h"

namespace agr::cuda {

// The number of elements that a thread processes at once: as many as fill 16 bytes of the widest type. It is the same
// for all tensors, so that the accesses of a warp to each of them are contiguous.
template <class... Stored>
constexpr int lanes_for = 16 / static_cast<int>(std::max({sizeof(Stored)...}));

// The bits of an element of at most 32.
AGR_DEVICE std::uint32_t bits_of(float x) { return bit_cast<std::uint32_t>(x); }
template <class Stored>
AGR_DEVICE std::uint32_t bits_of(Stored x) {
    return x.bits;
}
AGR_DEVICE void set_bits(float& x, std::uint32_t bits) { x = bit_cast<float>(bits); }
template <class Stored>
AGR_DEVICE void set_bits(Stored& x, std::uint32_t bits) {
    x.bits = static_cast<decltype(x.bits)>(bits);
}

// The random words of the counter that an element shares.
template <int unrolled>
AGR_DEVICE RandomWords<std::uint32_t> random_words_of(const RoundingKey& key, std::uint32_t array, std::int64_t index) {
    const auto counter = static_cast<std::uint64_t>(index) / elements_of_counter;
    return random_words<std::uint32_t, unrolled>(not_known(key), array, static_cast<std::uint32_t>(counter),
                                                 static_cast<std::uint32_t>(counter >> 32));
}

// Both are computed: a condition between elements of an array would move the array to memory.
AGR_DEVICE std::uint32_t select(bool which, std::uint32_t a, std::uint32_t b) { return which ? a : b; }

// `lanes` elements of a storage type, with the same bytes as in memory.
template <class Stored, int lanes>
struct Packed {
    static constexpr int bytes = lanes * static_cast<int>(sizeof(Stored));
    static constexpr int words = bytes / 4;
    std::uint32_t word[words];

    // The element at `lane`, converted to its compute type.
    AGR_DEVICE computed_in<Stored> get(int lane) const {
        if constexpr (sizeof(Stored) == 2)
            return widened(Stored{static_cast<std::uint16_t>(word[lane / 2] >> (lane % 2 * 16))});
        else if constexpr (sizeof(Stored) == 4)
            return bit_cast<float>(word[lane]);
        else
            return bit_cast<double>(word[2 * lane] | static_cast<std::uint64_t>(word[2 * lane + 1]) << 32);
    }

    AGR_DEVICE void set(const computed_in<Stored> (&values)[lanes]) {
#pragma unroll
        for (int i = 0; i < lanes; ++i) {
            if constexpr (sizeof(Stored) == 2) {
                if (i % 2 == 0) word[i / 2] = rounded_pair(Stored{}, values[i], values[i + 1]);
            } else if constexpr (sizeof(Stored) == 4) {
                word[i] = bit_cast<std::uint32_t>(values[i]);
            } else {
                const auto bits = bit_cast<std::uint64_t>(values[i]);
                word[2 * i] = static_cast<std::uint32_t>(bits);
                word[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
            }
        }
    }

    // The same, rounded stochastically: `first` is the index in its tensor of the first element, a multiple of `lanes`.
    AGR_DEVICE void set_stochastically(const float (&values)[lanes], const RoundingKey& key, std::uint32_t array,
                                       std::int64_t first) {
        static_assert(std::is_same_v<Stored, bfloat16> && elements_of_counter % lanes == 0, "as it is rounded");
        const auto random = random_words_of<10>(key, array, first);
        // Which of the counter's words are these elements': all, or those of one half.
        const bool second = lanes < elements_of_counter && first % elements_of_counter != 0;
#pragma unroll
        for (int i = 0; i < lanes; i += 2) {
            const std::uint32_t numbers = select(second, random.word[(i + lanes) / 2 % 4], random.word[i / 2]);
            word[i / 2] = rounded_stochastically<std::uint32_t>(values[i], numbers & 0xffffu) |
                          rounded_stochastically<std::uint32_t>(values[i + 1], numbers >> 16) << 16;
        }
    }

    // The bits of the element at `lane`, of 8 bits.
    AGR_DEVICE std::uint32_t code(int lane) const { return word[lane / 4] >> (lane % 4 * 8) & 0xffu; }
    AGR_DEVICE void set_code(int lane, std::uint32_t code) {
        word[lane / 4] = (lane % 4 == 0 ? 0u : word[lane / 4]) | code << (lane % 4 * 8);
    }

    AGR_DEVICE static bool aligned(const void* address) {
        return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
    }

    template <Eviction eviction>
    AGR_DEVICE void load(const Stored* from) {
        load_words<eviction>(from, word);
    }
    template <Eviction eviction>
    AGR_DEVICE void store(Stored* to) const {
        store_words<eviction>(to, word);
    }

    // The same for elements of which only the first `count` exist, which may be none, or that are not aligned. Those
    // that do not exist become 0.
    AGR_DEVICE void load_some(const Stored* from, int count) {
        constexpr int each = 4 / static_cast<int>(sizeof(Stored));
#pragma unroll
        for (int i = 0; i < words; ++i) {
            word[i] = 0;
#pragma unroll
            for (int k = 0; k < each; ++k)
                if (i * each + k < count) word[i] |= bits_of(from[i * each + k]) << (k * 32 / each % 32);
        }
    }
    AGR_DEVICE void store_some(Stored* to, int count) const {
        constexpr int each = 4 / static_cast<int>(sizeof(Stored));
#pragma unroll
        for (int i = 0; i < lanes; ++i)
            if (i < count) set_bits(to[i], word[i / each] >> (i % each * 32 / each % 32));
    }
};

// Conversions of a single element to its compute type, and back to its storage type.
AGR_DEVICE float to_computed(float x) { return x; }
AGR_DEVICE double to_computed(double x) { return x; }
AGR_DEVICE float to_computed(bfloat16 x) { return widened(x); }
AGR_DEVICE float to_computed(float16 x) { return widened(x); }

// One element, rounded stochastically: small code, for few elements.
AGR_DEVICE bfloat16 to_stored_stochastically(float x, const RoundingKey& key, std::uint32_t array, std::int64_t index) {
    const auto random = random_words_of<1>(key, array, index);
    const int place = static_cast<int>(index % elements_of_counter);
    std::uint32_t numbers = random.word[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) numbers = select(place / 2 == i, random.word[i], numbers);
    return {
        static_cast<std::uint16_t>(rounded_stochastically<std::uint32_t>(x, numbers >> (place % 2 * 16) & 0xffffu))};
}

template <class Stored>
AGR_DEVICE Stored to_stored(computed_in<Stored> x) {
    if constexpr (sizeof(Stored) == 2)
        return Stored{static_cast<std::uint16_t>(rounded_pair(Stored{}, x, x))};
    else
        return x;
}

}  // namespace agr::cuda
