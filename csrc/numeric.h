// The storage types, the compute type of each, and the arithmetic that the update rules need.
//
// An update rule is written once for a value type V. On a GPU, V is float or double; on a CPU it is a vector of them
// (the compilers' vector extension). This file defines every function that a rule applies to values of type V.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define AGR_INLINE __host__ __device__ __forceinline__
#else
// These functions must never be emitted out of line. The CPU kernels are compiled once for each instruction set, and
// the linker keeps a single out-of-line copy of an inline function: if it kept the AVX-512 one, the kernels for older
// processors would call it too.
#define AGR_INLINE inline __attribute__((always_inline))
#endif

namespace agr {

struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

// The type in which arithmetic on a stored type is done: double for double, float for all others.
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

// 1 / x, rounded once. On a GPU, a division of float32 may be two units in the last place off (-prec-div=false).
AGR_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    return __frcp_rn(x);
#else
    return 1 / x;
#endif
}
AGR_INLINE double reciprocal(double x) { return 1 / x; }

// Returns a where x is positive, and b where x is negative or -0. Written with bit operations because nvcc compiles a
// loop twice if it contains a condition that does not change within the loop.
AGR_INLINE float select_by_sign(float x, float a, float b) {
    const auto negative = static_cast<std::uint32_t>(bit_cast<std::int32_t>(x) >> 31);
    return bit_cast<float>((bit_cast<std::uint32_t>(a) & ~negative) | (bit_cast<std::uint32_t>(b) & negative));
}
AGR_INLINE double select_by_sign(double x, double a, double b) {
    const auto negative = static_cast<std::uint64_t>(bit_cast<std::int64_t>(x) >> 63);
    return bit_cast<double>((bit_cast<std::uint64_t>(a) & ~negative) | (bit_cast<std::uint64_t>(b) & negative));
}

// The part of x, which is not negative, before the point.
template <class U>
AGR_INLINE U truncated(float x) {
    return static_cast<U>(x);
}

// The smaller and the larger of two values of which b is a number; a may be NaN, which gives b.
AGR_INLINE float smaller_number(float a, float b) {
#if defined(__CUDA_ARCH__)
    return fminf(a, b);
#else
    return a < b ? a : b;
#endif
}
AGR_INLINE float larger_number(float a, float b) {
#if defined(__CUDA_ARCH__)
    return fmaxf(a, b);
#else
    return a > b ? a : b;
#endif
}

// The upper half of the product of two words. The CPU kernels specialize it for vectors.
template <class U>
struct Product {
    static AGR_INLINE U high(U a, std::uint32_t b) { return static_cast<U>((static_cast<std::uint64_t>(a) * b) >> 32); }
};

// Returns x to the power of a step count, by repeated squaring. The error is a few roundings of double, and on a GPU it
// takes a tenth of the registers of pow.
AGR_INLINE double power(double x, double count) {
    double result = 1;
    for (auto n = static_cast<std::uint64_t>(count); n != 0; n >>= 1) {
        if (n & 1) result *= x;
        x *= x;
    }
    return result;
}

#if defined(__CUDACC__)
// Products and sums with a single rounding: a b + c, a b - c and c - a b. nvcc is told to fuse nothing by itself
// (-fmad=false), so that what is rounded is what is written: `p decay - step` with two roundings has four times the
// error.
AGR_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
AGR_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
template <class V>
AGR_INLINE V multiply_subtract(V a, V b, V c) {
    return multiply_add(a, b, -c);
}
template <class V>
AGR_INLINE V subtract_product(V c, V a, V b) {
    return multiply_add(-a, b, c);
}
#else
// The same, with a single rounding where the processor has an instruction for it: these compilers fuse by themselves
// (-ffp-contract=fast), and a library's fma would be slow where there is none.
template <class V, class B, class C>
AGR_INLINE V multiply_add(V a, B b, C c) {
    return a * b + c;
}
template <class V, class B>
AGR_INLINE V multiply_subtract(V a, B b, V c) {
    return a * b - c;
}
template <class C, class V, class B>
AGR_INLINE V subtract_product(C c, V a, B b) {
    return c - a * b;
}
// A comparison of vectors, which is done once before a loop, and not a branch within it.
template <class V, class T>
AGR_INLINE V select_by_sign(T x, V a, V b) {
    return V{} + x > V{} ? a : b;
}
// As signed integers, for which every instruction set has a conversion.
template <class U, class V, int lanes = sizeof(V) / sizeof(V{}[0])>
AGR_INLINE U truncated(V x) {
    typedef std::int32_t Signed __attribute__((vector_size(sizeof(V))));
    return bit_cast<U>(__builtin_convertvector(x, Signed));
}
// The same for vectors, lane by lane. Compilers turn each of these loops into one instruction.
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
template <class V, int lanes = sizeof(V) / sizeof(V{}[0])>
AGR_INLINE V smaller_number(V a, V b) {
    return a < b ? a : b;
}
template <class V, int lanes = sizeof(V) / sizeof(V{}[0])>
AGR_INLINE V larger_number(V a, V b) {
    return a > b ? a : b;
}
#endif

// The larger of two values, or NaN if either is NaN, as in torch.maximum.
template <class V>
AGR_INLINE V maximum(V a, V b) {
    return ((a > b) | (a != a)) ? a : b;
}

// The averages of an element whose gradient stays 0 decay to denormal numbers and remain there: a few units in the last
// place, multiplied by a beta, round to themselves. Arithmetic on denormal numbers is slow on CPUs, so the CPU kernels
// replace these averages by 0. The section "Averages that fade" of docs/design.md bounds the error that this causes.

template <class T>
constexpr T smallest_normal = static_cast<T>(sizeof(T) == sizeof(float) ? 0x1p-126 : 0x1p-1022);

// Whether an average of gradients may be replaced by 0: the gradient adds nothing to it, and its value is denormal.
template <class T, class V>
AGR_INLINE auto faded(V average, V gradient) {
    return (gradient == T(0)) & (magnitude(average) < smallest_normal<T>);
}

// The denominator of a step, as a function of the average of squares v: sqrt(v) * factor + eps. It is
// (sqrt(v) correction + eps) / scale, so that a rule divides the average of gradients m by it to get the whole step,
// scale m / (sqrt(v) correction + eps). There is only one division because scale m may be denormal, or m divided by the
// rest infinite, where the step is neither. A scale of 0 gives an infinite denominator and a step of 0.
template <class T>
struct Denominator {
    T factor, eps;

    static AGR_INLINE Denominator of(double correction, double eps, double scale) {
        const T factor = static_cast<T>(correction / scale);
        // An infinite factor would give NaN where v is 0. As the constant term, infinity gives a step of 0 for every v.
        if (factor - factor != T(0)) return {T(1), factor};
        return {factor, static_cast<T>(eps / scale)};
    }

    template <class V>
    AGR_INLINE V at(V v) const {
        return multiply_add(square_root(v), factor, eps);
    }
};

// An average of squares below this may be replaced by 0 once the averages of gradients that it divides have been. Such
// an average is denormal, and its square root is less than eps, so that the replacement never makes a denominator 0.
template <class T>
AGR_INLINE T negligible_square(T eps_squared) {
    return eps_squared < smallest_normal<T> ? eps_squared : smallest_normal<T>;
}

// Conversions of the 16-bit types, in integer arithmetic. They take one element or, lane by lane, a vector: F is float
// or a vector of float, and U is the unsigned 32-bit integer, or the vector of them, of the same shape. The low 16 bits
// of an integer are the stored bits.

template <class F, class U>
AGR_INLINE F widened_bfloat16(U bits) {
    return bit_cast<F>(bits << 16);
}

// Rounds to nearest, ties to even. Every NaN becomes the quiet NaN 0x7fc0. The result is in the upper half of the
// word; its lower half is undefined.
template <class U, class F>
AGR_INLINE U shifted_bfloat16(F x) {
    U bits = bit_cast<U>(x);
    U rounded = bits + 0x8000u + ((bits & 0x10000u) == 0u ? U{} - 1u : U{});
    return x != x ? U{} + 0x7fc00000u : rounded;
}

template <class U, class F>
AGR_INLINE U rounded_bfloat16(F x) {
    return shifted_bfloat16<U>(x) >> 16;
}

template <class F, class U>
AGR_INLINE F widened_float16(U bits) {
    U sign = (bits & 0x8000u) << 16;
    U magnitude_bits = (bits & 0x7fffu) << 13;
    U normal = magnitude_bits + 0x38000000u;
    // The unit in the last place of a denormal float16 is 2^-24. The bit cast gives 2^-14 plus the value, so
    // subtracting 2^-14 leaves the value. No intermediate result is a denormal float32, which would be slow, and would
    // become 0 in a thread that flushes denormals.
    U denormal = bit_cast<U>(bit_cast<F>(magnitude_bits + 0x38800000u) - 0x1p-14f);
    U finite = magnitude_bits < 0x00800000u ? denormal : normal;
    return bit_cast<F>((magnitude_bits >= 0x0f800000u ? normal + 0x38000000u : finite) | sign);
}

// Rounds to nearest, ties to even. Values that are too large become infinite, and every NaN becomes the quiet NaN
// 0x7e00.
template <class U, class F>
AGR_INLINE U rounded_float16(F x) {
    U bits = bit_cast<U>(x);
    U sign = (bits >> 16) & 0x8000u;
    U magnitude_bits = bits & 0x7fffffffu;
    U normal = (magnitude_bits - 0x38000000u + 0xfffu + ((magnitude_bits >> 13) & 1u)) >> 13;
    // Below 2^-14 the unit in the last place of float16 is 2^-24. float32 has the same unit between 0.5 and 1, so
    // adding 0.5 rounds to it.
    U denormal = bit_cast<U>(bit_cast<F>(magnitude_bits) + 0.5f) - 0x3f000000u;
    U finite = magnitude_bits < 0x38800000u ? denormal : normal;
    U infinite = magnitude_bits > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
    return (magnitude_bits >= 0x477ff000u ? infinite : finite) | sign;
}

}  // namespace agr
