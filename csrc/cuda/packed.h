// A few neighbouring elements as one thread loads, computes and stores them: 8 or 16 bytes of each tensor.
#pragma once

#include "intrinsics.h"

namespace agr::cuda {

// As many elements as make 16 bytes of the widest type, so that a warp's accesses to every tensor are contiguous.
template <class P, class G, class S>
constexpr int lanes_for =
    16 / static_cast<int>(sizeof(P) > sizeof(G) ? (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S))
                                                : (sizeof(G) > sizeof(S) ? sizeof(G) : sizeof(S)));

// `lanes` elements of a stored type, as they lie in memory.
template <class Stored, int lanes>
struct Packed {
    static constexpr int bytes = lanes * static_cast<int>(sizeof(Stored));
    static constexpr int words = bytes / 4;
    std::uint32_t word[words];

    // The one element in which `lane` is, as what it is computed in.
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

    template <Stay stay>
    AGR_DEVICE void load(const Stored* from) {
        load_words<stay>(from, word);
    }
    AGR_DEVICE void store(Stored* to) const { store_words(to, word); }
};

// One element by itself, as what it is computed in, and back.
AGR_DEVICE float stored(float x) { return x; }
AGR_DEVICE double stored(double x) { return x; }
AGR_DEVICE float stored(bfloat16 x) { return widened(x); }
AGR_DEVICE float stored(float16 x) { return widened(x); }

template <class Stored>
AGR_DEVICE Stored rounded(computed_in<Stored> x) {
    if constexpr (sizeof(Stored) == 2)
        return Stored{static_cast<std::uint16_t>(rounded_pair(Stored{}, x, x))};
    else
        return x;
}

}  // namespace agr::cuda
