// The kernels, compiled once for each type of parameter and each of AdamW and Adan. AGR_RULES, AGR_STORED and AGR_TYPE
// name those, AGR_KERNEL the function that gives the kernels out.
#include "block.h"
#include "kernels.h"

namespace agr::cuda {
namespace {

// Four blocks on a multiprocessor have 128 registers a thread: enough for two batches of AdamW's loads in each, 64 KB
// in flight.
template <class Rules, class P, class G, class S>
__global__ void __launch_bounds__(block_threads, 4) agr_step(const __grid_constant__ Arguments arguments) {
    using OneBlock = Block<Rules, P, G, S>;
    // As bytes, since its members are not constructed.
    __shared__ alignas(16) unsigned char memory[sizeof(typename OneBlock::Shared)];
    OneBlock(arguments, *reinterpret_cast<typename OneBlock::Shared*>(memory)).run();
}

template <class Rules, class P>
const void* kernel_for(Type parameter, const Types& types) {
    if (types.state != parameter) return nullptr;
    if (types.gradient == parameter) return reinterpret_cast<const void*>(&agr_step<Rules, P, P, P>);
    if constexpr (sizeof(P) == 2) {
        if (types.gradient == Type::float32) return reinterpret_cast<const void*>(&agr_step<Rules, P, float, P>);
    }
    return nullptr;
}

}  // namespace

const void* AGR_KERNEL(const Types& types) { return kernel_for<AGR_RULES, AGR_STORED>(Type::AGR_TYPE, types); }

}  // namespace agr::cuda
