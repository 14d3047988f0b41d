// The kernels. This file is compiled once for each parameter type and each of AdamW and Adan, which the macros
// AGR_RULES, AGR_STORED and AGR_TYPE name. AGR_KERNEL is the name of the function that returns the kernels.
#include "block.h"
#include "kernels.h"

namespace agr::cuda {
namespace {

// With four blocks per multiprocessor, a thread has 128 registers. That is enough for two batches of AdamW's loads in
// flight, which is 64 KB per multiprocessor.
template <class Rules, class P, class G, class S>
__global__ void __launch_bounds__(block_threads, 4) agr_step(const __grid_constant__ Arguments args) {
    using OneBlock = Block<Rules, P, G, S>;
    // Declared as bytes, since CUDA constructs no objects in shared memory.
    __shared__ alignas(16) unsigned char memory[sizeof(typename OneBlock::Shared)];
    OneBlock(args, *reinterpret_cast<typename OneBlock::Shared*>(memory)).run();
}

template <class Rules, class P>
const void* kernel_for(Type parameter, const Types& types) {
    if (types.state != parameter) return nullptr;
    if (types.gradient == parameter) return reinterpret_cast<const void*>(&agr_step<Rules, P, P, P>);
    if constexpr (sizeof(P) == 2 && !std::is_same_v<Rules, RegularizeRules>) {
        if (types.gradient == Type::float32) return reinterpret_cast<const void*>(&agr_step<Rules, P, float, P>);
    }
    return nullptr;
}

}  // namespace

const void* AGR_KERNEL(const Types& types) { return kernel_for<AGR_RULES, AGR_STORED>(Type::AGR_TYPE, types); }

}  // namespace agr::cuda
