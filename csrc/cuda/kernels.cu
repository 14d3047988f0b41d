// The kernels. This file is compiled once for each family of rules and each unit of format.h, which the macros
// AGR_FAMILY and AGR_UNIT name.
#include "block.h"
#include "kernels.h"

namespace agr::cuda {
namespace {

template <Family family>
using RulesOf = std::conditional_t<family == Family::adamw, AdamWRules,
                                   std::conditional_t<family == Family::adan, AdanRules, RegularizeRules>>;

// With four blocks per multiprocessor, a thread has 128 registers. That is enough for two batches of AdamW's loads in
// flight, which is 64 KB per multiprocessor. It is not enough for Adan's states and random numbers or new codes.
template <class Rules, class Format>
constexpr int blocks = std::is_same_v<Rules, AdanRules> && (Format::stochastic || Format::coded) ? 3 : 4;

template <class Rules, class Format>
__global__ void __launch_bounds__(block_threads, blocks<Rules, Format>)
    agr_step(const __grid_constant__ Arguments args) {
    using OneBlock = Block<Rules, Format>;
    // Declared as bytes, since CUDA constructs no objects in shared memory.
    __shared__ alignas(16) unsigned char memory[sizeof(typename OneBlock::Shared)];
    OneBlock(args, *reinterpret_cast<typename OneBlock::Shared*>(memory)).run();
}

template <class Rules, class... Formats>
const void* find(const Types& types, FormatList<Formats...>) {
    const void* found = nullptr;
    ((types == Formats::types ? found = reinterpret_cast<const void*>(&agr_step<Rules, Formats>) : nullptr), ...);
    return found;
}

}  // namespace

template <Family family, class Unit>
const void* kernel_of(const Types& types) {
    return find<RulesOf<family>>(types, Unit{});
}

template const void* kernel_of<Family::AGR_FAMILY, units::AGR_UNIT>(const Types& types);

}  // namespace agr::cuda
