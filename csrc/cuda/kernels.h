// The compiled kernels, and which of them a tensor needs.
#pragma once

#include "../step.h"
#include "format.h"

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

inline bool operator==(const Kernel& a, const Kernel& b) { return a.family == b.family && a.types == b.types; }

inline bool is_compiled(const Kernel& kernel) {
    return kernel.family == Family::regularize ? has_format(kernel.types, GradientUnits{})
                                               : has_format(kernel.types, OptimizerUnits{});
}

// The kernel function for these types, as cudaLaunchKernel takes it, or null if it is not of this unit. kernels.cu is
// compiled once for each family and unit.
template <Family family, class Unit>
const void* kernel_of(const Types& types);

}  // namespace agr::cuda
