// The interface of the CPU kernels. For every combination of types they compute the sums of a span's gradient and, for
// every update rule, the update of a span.
#pragma once

#include "../adamw.h"
#include "../adan.h"
#include "../agr.h"
#include "../step.h"

namespace agr::cpu {

// A rule's coefficients in both compute types. A kernel reads those in its own compute type.
template <class R>
struct CoefficientsOf {
    typename R::template Coefficients<float> in_float32;
    typename R::template Coefficients<double> in_float64;
};

// `coefficients` points to a CoefficientsOf the rule. `sum` points to the tensor's abs-sum, or is null if the gradient
// is not regularized. Every element of the gradient is multiplied by `scale`. If `sweeps`, averages that have faded to
// denormal numbers are replaced by 0 (see numeric.h).
using Update = void (*)(const Span& span, const void* coefficients, const double* sum, double scale, bool sweeps);

struct Kernels {
    double (*abs_sum)(const void* gradient, std::int64_t elements);
    Sums (*abs_sum_and_squares)(const void* gradient, std::int64_t elements);
    Update update[rules];  // indexed by Rule
};

// The kernels for these types, or null if none are compiled. There is one set of kernels for each instruction set.
const Kernels* avx512_kernels(const Types& types);
const Kernels* avx2_kernels(const Types& types);
const Kernels* portable_kernels(const Types& types);

struct InstructionSet {
    const char* name;
    const Kernels* (*kernels)(const Types& types);
};
// The widest instruction set that this processor supports, or the one that the environment variable AGR_CPU_ISA names
// ("avx512", "avx2" or "portable"). Throws std::runtime_error if that one was not built or is not supported.
const InstructionSet& instruction_set();

}  // namespace agr::cpu
