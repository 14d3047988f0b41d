// Runs the block code of the kernels on host threads, for every format or, with AGR_SAME_TYPES, for those that
// test_cuda.cpp has: under a sanitizer, compiling all takes minutes.
#include "host_launcher.h"

#include <cstring>
#include <stdexcept>

#include "../../csrc/cuda/block.h"

namespace agr::cuda {
namespace {

#if defined(AGR_SAME_TYPES)
using Units = UnitList<units::gradients, FormatList<Format<bfloat16, float, bfloat16>>>;
#else
using Units = OptimizerUnits;
#endif

template <class Rules, class Format>
void run(const Arguments& arguments, int blocks, unsigned seed) {
    using OneBlock = Block<Rules, Format>;
    run_blocks<typename OneBlock::Shared>(
        blocks, seed, [&](typename OneBlock::Shared& shared) { OneBlock(arguments, shared).run(); });
}

template <class Rules, class... Formats>
void run_unit(const Types& types, const Arguments& arguments, int blocks, unsigned seed, FormatList<Formats...>) {
    ((types == Formats::types ? run<Rules, Formats>(arguments, blocks, seed) : void()), ...);
}

template <class Rules, class... Each>
void run_units(const Types& types, const Arguments& arguments, int blocks, unsigned seed, UnitList<Each...>) {
    (run_unit<Rules>(types, arguments, blocks, seed, Each{}), ...);
}

}  // namespace

void HostLauncher::step(const Kernel& kernel, const Arguments& arguments, int blocks, int, void*) {
    ++steps;
    ++seed;
    switch (kernel.family) {
        case Family::adamw:
            return run_units<AdamWRules>(kernel.types, arguments, blocks, seed, Units{});
        case Family::adan:
            return run_units<AdanRules>(kernel.types, arguments, blocks, seed, Units{});
        case Family::regularize:
            return run_units<RegularizeRules>(kernel.types, arguments, blocks, seed, GradientUnits{});
    }
}

void HostLauncher::upload(const Upload& upload, int, void*) {
    ++uploads;
    std::memcpy(upload.destination, upload.data, static_cast<std::size_t>(upload.bytes));
}

}  // namespace agr::cuda
