// Storage types, the types they are computed in, and the few operations on values that the update rules need.
//
// A rule is written once for a *value* V: a float or double on a GPU, a vector of them (the compilers' vector
// extension) on a CPU. Everything that a rule calls on a value is here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define AGR_INLINE __host__ __device__ __forceinline__
#else
// Never emitted out of line: the CPU kernels are compiled once for each instruction set, and an out-of-line copy made
// with AVX-512 could be the one that the linker keeps for everybody.
#define AGR_INLINE inline __attribute__((always_inline))
#endif

namespace agr {

struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

// The type in which arithmetic on a stored type is done.
template <class Stored>
struct ComputedIn {
    using type = float;
};
template <>
struct ComputedIn<double> {
    using type = double;
};
template <class Stored>
using computed_in = typename ComputedIn<Stored>::type;

template <class To, class From>
AGR_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

AGR_INLINE float magnitude(float x) { return fabsf(x); }
AGR_INLINE double magnitude(double x) { return fabs(x); }
AGR_INLINE float square_root(float x) { return sqrtf(x); }
AGR_INLINE double square_root(double x) { return sqrt(x); }

// a where x is positive, b where it is negative or -0. By bits: for a condition that is the same throughout a loop,
// nvcc makes two loops.
AGR_INLINE float by_sign(float x, float a, float b) {
    const auto negative = static_cast<std::uint32_t>(bit_cast<std::int32_t>(x) >> 31);
    return bit_cast<float>((bit_cast<std::uint32_t>(a) & ~negative) | (bit_cast<std::uint32_t>(b) & negative));
}
AGR_INLINE double by_sign(double x, double a, double b) {
    const auto negative = static_cast<std::uint64_t>(bit_cast<std::int64_t>(x) >> 63);
    return bit_cast<double>((bit_cast<std::uint64_t>(a) & ~negative) | (bit_cast<std::uint64_t>(b) & negative));
}

// x to the power of a count of steps, by squaring: a few roundings of double, and on a GPU a tenth of pow's registers.
AGR_INLINE double power(double x, double count) {
    double result = 1;
    for (auto n = static_cast<std::uint64_t>(count); n != 0; n >>= 1) {
        if (n & 1) result *= x;
        x *= x;
    }
    return result;
}

#if !defined(__CUDACC__)
template <class V, class T>
AGR_INLINE V by_sign(T x, V a, V b) {
    return x > T(0) ? a : b;
}
// Of vectors, lane by lane; the compilers turn these loops into one instruction.
template <class V, int lanes = sizeof(V) / sizeof(V{}[0])>
AGR_INLINE V magnitude(V x) {
    for (int i = 0; i < lanes; ++i) x[i] = magnitude(x[i]);
    return x;
}
template <class V, int lanes = sizeof(V) / sizeof(V{}[0])>
AGR_INLINE V square_root(V x) {
    for (int i = 0; i < lanes; ++i) x[i] = square_root(x[i]);
    return x;
}
#endif

// The larger of two values; NaN if either is, as torch.maximum gives.
template <class V>
AGR_INLINE V larger(V a, V b) {
    return ((a > b) | (a != a)) ? a : b;
}

// Averages of an element whose gradient stays 0 decay to denormal numbers, and stop there for good: a few units in the
// last place times a beta round to themselves. CPUs are slow with such numbers, so that they sweep them away. What that
// loses, and that it does not matter, is in docs/design.md, "Averages that fade".

template <class T>
constexpr T smallest_normal = static_cast<T>(sizeof(T) == sizeof(float) ? 0x1p-126 : 0x1p-1022);

// Whether an average of gradients may go: it takes in nothing more, and what it holds is denormal.
template <class T, class V>
AGR_INLINE auto faded(V average, V gradient) {
    return (gradient == T(0)) & (magnitude(average) < smallest_normal<T>);
}

// What the root of an average of squares is multiplied by, and what is added to that, to make what an average of
// gradients is divided by to give the step: (sqrt(v) correction + eps) / scale. Divided by all at once, since scale m
// may be denormal and m / D infinite where the step is neither. A scale of 0 gives a step of 0.
template <class T>
struct Divisor {
    T root, eps;

    static AGR_INLINE Divisor of(double correction, double eps, double scale) {
        const T root = static_cast<T>(correction / scale);
        if (root - root != T(0)) return {T(1), root};
        return {root, static_cast<T>(eps / scale)};
    }
};

// What an average of squares may go below when the averages that it divides have: denormal, and of a root less than
// eps, so that a denominator never becomes 0 by it.
template <class T>
AGR_INLINE T negligible_square(T eps_squared) {
    return eps_squared < smallest_normal<T> ? eps_squared : smallest_normal<T>;
}

// The 16-bit types in integer arithmetic, for one element or, lane by lane, for a vector: F is float or floats, U the
// unsigned 32-bit integer or integers of the same shape, whose low halves hold the stored bits.

template <class F, class U>
AGR_INLINE F widened_bfloat16(U bits) {
    return bit_cast<F>(bits << 16);
}

// To nearest, ties to even; every NaN becomes the quiet one.
template <class U, class F>
AGR_INLINE U rounded_bfloat16(F x) {
    U bits = bit_cast<U>(x);
    U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? U{} + 0x7fc0u : rounded;
}

template <class F, class U>
AGR_INLINE F widened_float16(U bits) {
    U sign = (bits & 0x8000u) << 16;
    U size = (bits & 0x7fffu) << 13;
    U normal = size + 0x38000000u;
    // A denormal's unit is 2^-24, that of 2^-14 in float32: what is added to 2^-14 there is its value. No denormal
    // float32 comes up, which would be slow, and 0 where the thread flushes those.
    U denormal = bit_cast<U>(bit_cast<F>(size + 0x38800000u) - 0x1p-14f);
    U finite = size < 0x00800000u ? denormal : normal;
    return bit_cast<F>((size >= 0x0f800000u ? normal + 0x38000000u : finite) | sign);
}

// To nearest, ties to even; what is too large becomes infinite, every NaN the quiet one.
template <class U, class F>
AGR_INLINE U rounded_float16(F x) {
    U bits = bit_cast<U>(x);
    U sign = (bits >> 16) & 0x8000u;
    U size = bits & 0x7fffffffu;
    U normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    // Below 2^-14 the unit in the last place is 2^-24, that of 0.5 in float32: adding 0.5 rounds there.
    U denormal = bit_cast<U>(bit_cast<F>(size) + 0.5f) - 0x3f000000u;
    U finite = size < 0x38800000u ? denormal : normal;
    U infinite = size > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
    return (size >= 0x477ff000u ? infinite : finite) | sign;
}

}  // namespace agr
