// Tests of the conversions, of psi, and of the sums of a gradient.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <vector>

#include "../../csrc/agr.h"
#include "../../csrc/cpu/kernels.h"
#include "check.h"

using namespace agr;

namespace {

// The value of a float16, from the definition of the format.
double half_value(std::uint32_t bits) {
    const int exponent = (bits >> 10) & 31;
    const double fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
    return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

void test_sixteen_bit_types() {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float half = widened_float16<float>(bits);
        const double expected = half_value(bits);
        CHECK(half == expected || (std::isnan(half) && std::isnan(expected)), "half %x is %g", bits, half);
        if (std::isnan(half)) {
            CHECK((rounded_float16<std::uint32_t>(half) & 0x7fff) == 0x7e00, "NaN %x", bits);
        } else {
            CHECK(rounded_float16<std::uint32_t>(half) == bits, "half %x does not come back", bits);
            // The value halfway between two neighbours is rounded to the even one, a value next to it to the nearer
            // one.
            const double next = half_value(bits + 1);
            if ((bits & 0x7fff) < 0x7bff && std::isfinite(next)) {
                const float middle = static_cast<float>((half + next) / 2);
                const std::uint32_t even = bits & 1 ? bits + 1 : bits;
                CHECK(rounded_float16<std::uint32_t>(middle) == even, "the middle above half %x", bits);
                CHECK(rounded_float16<std::uint32_t>(std::nextafterf(middle, half)) == bits, "below the middle, %x",
                      bits);
            }
        }
        const float brain = widened_bfloat16<float>(bits);
        if (std::isnan(brain)) {
            CHECK(rounded_bfloat16<std::uint32_t>(brain) == 0x7fc0, "NaN %x", bits);
        } else {
            CHECK(rounded_bfloat16<std::uint32_t>(brain) == bits, "bfloat16 %x does not come back", bits);
            if (!std::isinf(brain)) {
                const float middle = bit_cast<float>((bits << 16) + 0x8000u);
                CHECK(rounded_bfloat16<std::uint32_t>(middle) == (bits & 1 ? bits + 1 : bits), "the middle above %x",
                      bits);
            }
        }
    }
    CHECK(rounded_float16<std::uint32_t>(65519.9f) == 0x7bff, "the largest half");
    CHECK(rounded_float16<std::uint32_t>(65520.0f) == 0x7c00, "too large for a half");
}

#if defined(__x86_64__)
// The conversions give the right result in a thread that flushes denormals, since no intermediate result is a denormal
// float32.
void test_halves_while_denormals_are_flushed() {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    for (std::uint32_t bits = 0; bits < 0x7c00; ++bits) {
        const float half = widened_float16<float>(bits);
        CHECK(half == half_value(bits) && rounded_float16<std::uint32_t>(half) == bits, "half %x is %g", bits, half);
    }
    _mm_setcsr(before);
}
#endif

void test_psi() {
    const auto psi = [](double g, double sum, double scale = 1) {
        return regularized(static_cast<float>(g), AbsSum<float>::of(sum).for_scale(scale));
    };
    CHECK(psi(3, 3) == 0 && psi(-1e-30f, 1e-30f) == 0, "one element gives exactly 0");
    CHECK(psi(0, 0) == 0, "all zeros give 0");
    CHECK(psi(5, INFINITY) == 5 && std::isnan(psi(INFINITY, INFINITY)), "an infinite sum");
    CHECK(std::isnan(psi(5, NAN)) && std::isnan(psi(NAN, NAN)), "a sum of NaN");
    CHECK(std::isnan(psi(5, INFINITY, 0)), "0 times an infinite sum");
    CHECK(psi(5, 8, 0) == 5 * 0.375f, "a scale of 0 is applied later");
    // One element dominates: psi of it is nearly the sum of the others, which is far below the rounding error of S.
    const double others = 1e-9;
    CHECK(std::fabs(psi(1, 1 + others) / others - 1) < 1e-6, "a dominated tensor: %g", psi(1, 1 + others));
    // The sum is denormal, so 1 / S would overflow.
    CHECK(regularized(1e-310, AbsSum<double>::of(1e-310)) == 0, "one denormal element, float64");
    CHECK(std::fabs(regularized(1e-310, AbsSum<double>::of(4e-310)) / 7.5e-311 - 1) < 1e-9, "denormal, float64");
    // The sum is so large that 1 / S would be denormal, or that the sum overflows float32.
    CHECK(psi(0x1p126f, 0x1p127) == 0x1p125f && psi(0x1p126f, 0x1p128) == 0.75f * 0x1p126f, "a large sum");
    CHECK(psi(1e-41f, 4 * static_cast<double>(1e-41f)) == static_cast<float>(0.75 * 1e-41f), "denormal");
}

// Tensors in which one element outweighs the sum of all others, at every position that the sums treat differently.
void test_outweighed_tensors() {
    for (Type type : {Type::float32, Type::bfloat16, Type::float16}) {
        const cpu::Kernels* kernels = cpu::instruction_set().kernels({type, type, type});
        for (std::int64_t n : {2, 16, 17, 127, 128, 129, 1000, 5003}) {
            for (std::int64_t place : {std::int64_t{0}, n / 2, n - 1}) {
                const float dust = 0x1p-14f;
                std::vector<float> single(n, dust);
                single[place] = 1;
                std::vector<std::uint16_t> half(n);
                for (std::int64_t i = 0; i < n; ++i)
                    half[i] =
                        static_cast<std::uint16_t>(type == Type::float16 ? rounded_float16<std::uint32_t>(single[i])
                                                                         : rounded_bfloat16<std::uint32_t>(single[i]));
                const void* gradient = type == Type::float32 ? static_cast<const void*>(single.data()) : half.data();
                const double expected = 1 + static_cast<double>(n - 1) * dust;
                const double sum = kernels->abs_sum(gradient, n);
                CHECK(sum == expected, "%" PRId64 " of %" PRId64 ": %.17g", place, n, sum);
            }
        }
    }
}

// Where no element outweighs the others, the abs-sum has an error of at most three roundings of float32.
void test_sums() {
    const cpu::Kernels* kernels = cpu::instruction_set().kernels({Type::float32, Type::float32, Type::float32});
    for (std::int64_t n : {0, 1, 5, 127, 128, 4097, 32768}) {
        std::vector<float> gradient(n);
        long double abs_sum = 0, squares = 0;
        for (float& g : gradient) {
            g = static_cast<float>(normal());
            abs_sum += std::fabs(g);
            squares += static_cast<long double>(g) * g;
        }
        const agr::Sums both = kernels->abs_sum_and_squares(gradient.data(), n);
        CHECK(std::fabs(kernels->abs_sum(gradient.data(), n) - abs_sum) <= 3 * 0x1p-24 * abs_sum, "%" PRId64, n);
        CHECK(std::fabs(both.abs_sum - abs_sum) <= 1e-14 * abs_sum, "%" PRId64, n);
        CHECK(std::fabs(both.squares - squares) <= 1e-14 * squares, "%" PRId64, n);
    }
}

}  // namespace

void test_numbers() {
    test_sixteen_bit_types();
#if defined(__x86_64__)
    test_halves_while_denormals_are_flushed();
#endif
    test_psi();
    test_outweighed_tensors();
    test_sums();
}
