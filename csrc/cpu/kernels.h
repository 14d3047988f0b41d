// The CPU kernels: the sums of a span's gradient, and the update of a span, for every rule and combination of types.
#pragma once

#include "../adamw.h"
#include "../adan.h"
#include "../agr.h"
#include "../step.h"

namespace agr::cpu {

// Numbers in both compute types; a kernel takes those of its own.
template <class R>
struct NumbersOf {
    typename R::template Numbers<float> single;
    typename R::template Numbers<double> twice;
};

// `numbers` points to the NumbersOf the rule, `sum` to the tensor's abs-sum, or is null where the gradient is not
// regularized. Every element of the gradient is multiplied by `scale`. Averages that have faded are swept away
// (numeric.h) if `sweeps`.
using Update = void (*)(const Span& span, const void* numbers, const double* sum, double scale, bool sweeps);

struct Kernels {
    double (*magnitudes)(const void* gradient, std::int64_t elements);
    Sums (*magnitudes_and_squares)(const void* gradient, std::int64_t elements);
    Update update[rules];  // by Rule
};

// The kernels for these types, or null if there are none. One set of them for each instruction set compiled.
const Kernels* avx512_kernels(const Types& types);
const Kernels* avx2_kernels(const Types& types);
const Kernels* portable_kernels(const Types& types);

struct InstructionSet {
    const char* name;
    const Kernels* (*kernels)(const Types& types);
};
// The widest that this processor runs; or the one that the environment variable AGR_CPU_ISA names ("avx512", "avx2",
// "portable"). Throws std::runtime_error if that one is not built, or does not run here.
const InstructionSet& instruction_set();

}  // namespace agr::cpu
