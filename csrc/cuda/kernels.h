// The compiled kernels, and which of them a tensor needs.
#pragma once

#include "../step.h"

namespace agr::cuda {

// What has kernels of its own. AdamW with and without AMSGrad share a kernel.
enum class Family : std::uint8_t { adamw, adan, regularize };
constexpr int families = 3;  // the number of families

constexpr Family family_of(Rule rule) {
    return rule == Rule::regularize ? Family::regularize : rule == Rule::adan ? Family::adan : Family::adamw;
}

// Identifies a kernel. Tensors with the same kernel share a launch.
struct Kernel {
    Family family;
    Types types;
};

inline bool operator==(const Kernel& a, const Kernel& b) {
    return a.family == b.family && a.types == b.types;
}

// Whether a kernel is compiled: the state has the parameter's type, and gradients have that type or, for 16-bit
// parameters, float32. Where a gradient is regularized in place, it is the parameter.
constexpr bool is_compiled(const Kernel& kernel) {
    const Types& types = kernel.types;
    const bool mixed = kernel.family != Family::regularize && bytes_of(types.parameter) == 2;
    return types.state == types.parameter && !types.master && !types.stochastic &&
           (types.gradient == types.parameter || (mixed && types.gradient == Type::float32));
}

// The kernel function for a parameter type, as cudaLaunchKernel takes it, or null if `types` has no compiled kernel.
const void* adamw_float32(const Types& types);
const void* adamw_bfloat16(const Types& types);
const void* adamw_float16(const Types& types);
const void* adamw_float64(const Types& types);
const void* adan_float32(const Types& types);
const void* adan_bfloat16(const Types& types);
const void* adan_float16(const Types& types);
const void* adan_float64(const Types& types);
const void* regularize_float32(const Types& types);
const void* regularize_bfloat16(const Types& types);
const void* regularize_float16(const Types& types);
const void* regularize_float64(const Types& types);

}  // namespace agr::cuda
