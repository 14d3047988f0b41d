// Vectors as wide as the registers of the instruction set that is compiled for, with loads and stores that convert from
// and to the storage types. Only kernels.cpp includes this file; it is compiled once for each instruction set.
#pragma once

#if defined(__F16C__)
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
template <int lanes>
AGR_INLINE vector<std::uint32_t, lanes> load_bits(const void* from) {
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
template <int lanes>
AGR_INLINE void store_bits(void* to, vector<std::uint32_t, lanes> bits) {
    auto narrow = __builtin_convertvector(bits, vector<std::uint16_t, lanes>);
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

}  // namespace
}  // namespace agr::cpu
