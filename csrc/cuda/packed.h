// Packed elements: the 8 or 16 bytes of neighbouring elements of a tensor that a thread loads or stores at once.
#pragma once

#include "intrinsics.h"

namespace agr::cuda {

// The number of elements that a thread processes at once: as many as fill 16 bytes of the widest type. It is the same
// for all tensors, so that the accesses of a warp to each of them are contiguous.
template <class P, class G, class S>
constexpr int lanes_for =
    16 / static_cast<int>(sizeof(P) > sizeof(G) ? (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S))
                                                : (sizeof(G) > sizeof(S) ? sizeof(G) : sizeof(S)));

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
};

// Conversions of a single element to its compute type, and back to its storage type.
AGR_DEVICE float to_computed(float x) { return x; }
AGR_DEVICE double to_computed(double x) { return x; }
AGR_DEVICE float to_computed(bfloat16 x) { return widened(x); }
AGR_DEVICE float to_computed(float16 x) { return widened(x); }

template <class Stored>
AGR_DEVICE Stored to_stored(computed_in<Stored> x) {
    if constexpr (sizeof(Stored) == 2)
        return Stored{static_cast<std::uint16_t>(rounded_pair(Stored{}, x, x))};
    else
        return x;
}

}  // namespace agr::cuda
