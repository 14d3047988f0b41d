// The kernels that are compiled, and which of them a tensor needs.
#pragma once

#include "../step.h"

namespace agr::cuda {

// AdamW with and without AMSGrad share a kernel.
enum class Family : std::uint8_t { adamw, adan };

constexpr Family family_of(Rule rule) { return rule == Rule::adan ? Family::adan : Family::adamw; }

// Tensors for which this is the same share a launch.
struct Kernel {
    Family family;
    Types types;
};

inline bool operator==(const Kernel& a, const Kernel& b) {
    return a.family == b.family && a.types.parameter == b.types.parameter && a.types.gradient == b.types.gradient &&
           a.types.state == b.types.state;
}

// Whether kernels are compiled for this: state of the parameter's type, gradients of that type or, for the 16-bit
// types, float32.
constexpr bool is_compiled(const Types& types) {
    return types.state == types.parameter &&
           (types.gradient == types.parameter || (bytes_of(types.parameter) == 2 && types.gradient == Type::float32));
}

// The kernels of one type of parameter, as cudaLaunchKernel takes them; null for other types of gradient and state.
const void* adamw_float32(const Types& types);
const void* adamw_bfloat16(const Types& types);
const void* adamw_float16(const Types& types);
const void* adamw_float64(const Types& types);
const void* adan_float32(const Types& types);
const void* adan_bfloat16(const Types& types);
const void* adan_float16(const Types& types);
const void* adan_float64(const Types& types);

}  // namespace agr::cuda
