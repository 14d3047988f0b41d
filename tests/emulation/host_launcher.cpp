// Runs the block code of the kernels on host threads, for every combination of types.
#include "host_launcher.h"

#include <cstring>
#include <stdexcept>

#include "../../csrc/cuda/block.h"

namespace agr::cuda {
namespace {

template <class Rules, class P, class G, class S>
void run(const Arguments& arguments, int blocks, unsigned seed) {
    using OneBlock = Block<Rules, P, G, S>;
    run_blocks<typename OneBlock::Shared>(
        blocks, seed, [&](typename OneBlock::Shared& shared) { OneBlock(arguments, shared).run(); });
}

template <class Rules>
void run(const Types& types, const Arguments& arguments, int blocks, unsigned seed) {
    if constexpr (!std::is_same_v<Rules, RegularizeRules>) {
        if (types.gradient == Type::float32 && types.parameter == Type::bfloat16)
            return run<Rules, bfloat16, float, bfloat16>(arguments, blocks, seed);
        if (types.gradient == Type::float32 && types.parameter == Type::float16)
            return run<Rules, float16, float, float16>(arguments, blocks, seed);
    }
    switch (types.parameter) {
        case Type::float32:
            return run<Rules, float, float, float>(arguments, blocks, seed);
        case Type::bfloat16:
            return run<Rules, bfloat16, bfloat16, bfloat16>(arguments, blocks, seed);
        case Type::float16:
            return run<Rules, float16, float16, float16>(arguments, blocks, seed);
        case Type::float64:
            return run<Rules, double, double, double>(arguments, blocks, seed);
    }
}

}  // namespace

void HostLauncher::step(const Kernel& kernel, const Arguments& arguments, int blocks, int, void*) {
    ++steps;
    switch (kernel.family) {
        case Family::adamw:
            return run<AdamWRules>(kernel.types, arguments, blocks, ++seed);
        case Family::adan:
            return run<AdanRules>(kernel.types, arguments, blocks, ++seed);
        case Family::regularize:
            return run<RegularizeRules>(kernel.types, arguments, blocks, ++seed);
    }
}

void HostLauncher::upload(const Upload& upload, int, void*) {
    ++uploads;
    std::memcpy(upload.destination, upload.data, static_cast<std::size_t>(upload.bytes));
}

}  // namespace agr::cuda
