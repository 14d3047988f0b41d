// Vectors as wide as the registers of the instruction set that is compiled for, with loads and stores that convert from
// and to the storage types. Only kernels.cpp includes this file; it is compiled once for each instruction set.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../numeric.h"

#if defined(__AVX512F__)
#define AGR_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define AGR_VECTOR_BYTES 32
#else
#define AGR_VECTOR_BYTES 16  // SSE2, NEON
#endif

namespace agr::cpu {
// The unnamed namespace keeps the linker from sharing these functions between instruction sets, for which they differ.
namespace {

template <class T, int lanes>
struct VectorOf {
    typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <class T, int lanes>
using vector = typename VectorOf<T, lanes>::type;

template <class To, class From>
AGR_INLINE To load_unaligned(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof(to));
    return to;
}

template <int lanes>
AGR_INLINE vector<float, lanes> load(const float* from) {
    return load_unaligned<vector<float, lanes>>(from);
}
template <int lanes>
AGR_INLINE vector<double, lanes> load(const double* from) {
    return load_unaligned<vector<double, lanes>>(from);
}
// 16-bit numbers as words. GCC takes four instructions where AVX2 has one.
template <int lanes>
AGR_INLINE vector<std::uint32_t, lanes> load_bits(const void* from) {
#if defined(__AVX2__)
    if constexpr (lanes == 8)
        return (vector<std::uint32_t, 8>)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#endif
    return __builtin_convertvector(
        load_unaligned<vector<std::uint16_t, lanes>>(static_cast<const std::uint16_t*>(from)),
        vector<std::uint32_t, lanes>);
}
template <int lanes>
AGR_INLINE vector<float, lanes> load(const bfloat16* from) {
    return widened_bfloat16<vector<float, lanes>>(load_bits<lanes>(from));
}
template <int lanes>
AGR_INLINE vector<float, lanes> load(const float16* from) {
#if defined(__AVX512F__)
    if constexpr (lanes == 16)
        return (vector<float, 16>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
#if defined(__F16C__)
    if constexpr (lanes == 8)
        return (vector<float, 8>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    return widened_float16<vector<float, lanes>>(load_bits<lanes>(from));
}

template <class V>
AGR_INLINE void store(float* to, V value) {
    std::memcpy(to, &value, sizeof(value));
}
template <class V>
AGR_INLINE void store(double* to, V value) {
    std::memcpy(to, &value, sizeof(value));
}
// Narrows words of at most 16 bits to 16, or of at most 8 to 8. Before AVX-512 has one instruction for it, GCC does it
// element by element.
template <int lanes>
AGR_INLINE auto narrowed_to_16(vector<std::uint32_t, lanes> words) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (lanes == 8) {
        const __m256i halves = _mm256_packus_epi32((__m256i)words, (__m256i)words);
        return (vector<std::uint16_t, 8>)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
    } else
#elif defined(__SSE2__) && !defined(__AVX512F__)
    if constexpr (lanes == 4) {
        // Sign extended, since there is only a saturating instruction.
        const __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)words, 16), 16);
        const auto packed = (vector<std::uint64_t, 2>)_mm_packs_epi32(extended, extended);
        return bit_cast<vector<std::uint16_t, 4>>(static_cast<std::uint64_t>(packed[0]));
    } else
#endif
        return __builtin_convertvector(words, vector<std::uint16_t, lanes>);
}
template <int lanes>
AGR_INLINE auto narrowed_to_8(vector<std::uint32_t, lanes> words) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (lanes == 8) {
        const auto halves = (__m128i)narrowed_to_16<8>(words);
        const auto packed = (vector<std::uint64_t, 2>)_mm_packus_epi16(halves, halves);
        return bit_cast<vector<std::uint8_t, 8>>(static_cast<std::uint64_t>(packed[0]));
    } else
#elif defined(__SSE2__) && !defined(__AVX512F__)
    if constexpr (lanes == 4) {
        const __m128i halves = _mm_packs_epi32((__m128i)words, (__m128i)words);
        const auto packed = (vector<std::uint32_t, 4>)_mm_packus_epi16(halves, halves);
        return bit_cast<vector<std::uint8_t, 4>>(static_cast<std::uint32_t>(packed[0]));
    } else
#endif
        return __builtin_convertvector(words, vector<std::uint8_t, lanes>);
}

template <int lanes>
AGR_INLINE void store_bits(void* to, vector<std::uint32_t, lanes> bits) {
    const auto narrow = narrowed_to_16<lanes>(bits);
    std::memcpy(to, &narrow, sizeof(narrow));
}
template <class V>
AGR_INLINE void store(bfloat16* to, V value) {
    constexpr int lanes = sizeof(V) / sizeof(float);
    store_bits<lanes>(to, rounded_bfloat16<vector<std::uint32_t, lanes>>(value));
}
template <class V>
AGR_INLINE void store(float16* to, V value) {
    constexpr int lanes = sizeof(V) / sizeof(float);
#if defined(__AVX512F__)
    if constexpr (lanes == 16) {
        auto halves = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
    }
#endif
#if defined(__F16C__)
    if constexpr (lanes == 8) {
        auto halves = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
    }
#endif
    store_bits<lanes>(to, rounded_float16<vector<std::uint32_t, lanes>>(value));
}

// Stores two vectors one after the other.
template <class Stored, class V>
AGR_INLINE void store_two(Stored* to, V first, V second) {
    store(to, first);
    store(to + sizeof(V) / sizeof(float), second);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// AVX2 narrows two vectors with the instructions that it takes for one.
AGR_INLINE void store_two(bfloat16* to, vector<float, 8> first, vector<float, 8> second) {
    using Words = vector<std::uint32_t, 8>;
    const __m256i halves =
        _mm256_packus_epi32((__m256i)rounded_bfloat16<Words>(first), (__m256i)rounded_bfloat16<Words>(second));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(halves, 0xd8));
}
#endif

template <class T>
constexpr int lanes_of = AGR_VECTOR_BYTES / static_cast<int>(sizeof(T));

// Vectors of consecutive elements that are loaded and stored together.
template <class T, int parts>
struct Parts {
    vector<T, lanes_of<T>> part[parts];
};

// A vector of words holds two bfloat16 numbers in each, of which the even elements are one vector of float32 and the
// odd ones another. The odd ones are in place, and no number crosses a lane.
template <class Stored>
constexpr int parts_of = 1;
template <>
constexpr int parts_of<bfloat16> = 2;

template <class T, int parts, class Stored>
AGR_INLINE Parts<T, parts> load_parts(const Stored* from) {
    constexpr int lanes = lanes_of<T>;
    if constexpr (parts == 1) {
        return {{load<lanes>(from)}};
    } else {
        using F = vector<float, lanes>;
        const auto words = load_unaligned<vector<std::uint32_t, lanes>>(from);
        return {{bit_cast<F>(words << 16), bit_cast<F>(words & 0xffff0000u)}};
    }
}

template <class T, int parts, class Stored>
AGR_INLINE void store_parts(Stored* to, const Parts<T, parts>& value) {
    if constexpr (parts == 1) {
        store(to, value.part[0]);
    } else {
        using Words = vector<std::uint32_t, lanes_of<T>>;
        const Words words =
            (shifted_bfloat16<Words>(value.part[0]) >> 16) | (shifted_bfloat16<Words>(value.part[1]) & 0xffff0000u);
        std::memcpy(to, &words, sizeof(words));
    }
}

}  // namespace
}  // namespace agr::cpu

namespace agr {

template <>
struct Product<cpu::vector<std::uint32_t, AGR_VECTOR_BYTES / 4>> {
    using U = cpu::vector<std::uint32_t, AGR_VECTOR_BYTES / 4>;
    using Wide = cpu::vector<std::uint64_t, AGR_VECTOR_BYTES / 8>;

    static AGR_INLINE U high(U a, std::uint32_t b) {
        // Instructions multiply every other word. The upper halves of the products of even words go down, those of odd
        // words are where they belong.
        const Wide even = multiplied((Wide)a, b), odd = multiplied((Wide)a >> 32, b);
        return (U)((even >> 32) | (odd & (std::uint64_t{0xffffffff} << 32)));
    }

private:
    // The products of the lower halves.
    static AGR_INLINE Wide multiplied(Wide a, std::uint32_t b) {
#if defined(__AVX512F__)
        return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32(static_cast<int>(b)));
#elif defined(__AVX2__)
        return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(static_cast<int>(b)));
#elif defined(__SSE2__)
        return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi32(static_cast<int>(b)));
#else
        return (a & 0xffffffffu) * b;
#endif
    }
};

}  // namespace agr
