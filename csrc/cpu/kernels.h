// The interface of the CPU kernels. For every combination of types they compute the sums of a span's gradient and, for
// every update rule, the update of a span.
#pragma once

#include "../adamw.h"
#include "../adan.h"
#include "../agr.h"
#include "../rounding.h"
#include "../step.h"

namespace agr::cpu {

// A rule's coefficients in both compute types. A kernel reads those in its own compute type.
template <class R>
struct CoefficientsOf {
    typename R::template Coefficients<float> in_float32;
    typename R::template Coefficients<double> in_float64;
};

// What an update of a span takes besides the span.
struct Inputs {
    const void* coefficients;  // a CoefficientsOf the rule
    const double* sum;         // the tensor's abs-sum, or null if the gradient is not regularized
    double scale;              // the factor of every element of the gradient
    bool sweeps;               // replace averages that have faded to denormal numbers by 0 (see numeric.h)
    Types types;
    RoundingKey rounding;
    std::int64_t first;  // the index of the span's first element in its tensor
};
using Update = void (*)(const Span& span, const Inputs& inputs);

struct Kernels {
    double (*abs_sum)(const void* gradient, std::int64_t elements);
    Sums (*abs_sum_and_squares)(const void* gradient, std::int64_t elements);
    Update update[rules];  // indexed by Rule
};

// The kernels for these types, or null if there are none. There is one set of kernels for each instruction set.
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
