// Runs the block code of the kernels on host threads, for every combination of types.
#include "host_launcher.h"

#include <cstring>
#include <stdexcept>

#include "../../csrc/cuda/block.h"

namespace agr::cuda {
namespace {

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

template <class Rules, class... Units>
void run_units(const Types& types, const Arguments& arguments, int blocks, unsigned seed, UnitList<Units...>) {
    (run_unit<Rules>(types, arguments, blocks, seed, Units{}), ...);
}

}  // namespace

void HostLauncher::step(const Kernel& kernel, const Arguments& arguments, int blocks, int, void*) {
    ++steps;
    ++seed;
    switch (kernel.family) {
        case Family::adamw:
            return run_units<AdamWRules>(kernel.types, arguments, blocks, seed, OptimizerUnits{});
        case Family::adan:
            return run_units<AdanRules>(kernel.types, arguments, blocks, seed, OptimizerUnits{});
        case Family::regularize:
            return run_units<RegularizeRules>(kernel.types, arguments, blocks, seed, GradientUnits{});
    }
}

void HostLauncher::upload(const Upload& upload, int, void*) {
    ++uploads;
    std::memcpy(upload.destination, upload.data, static_cast<std::size_t>(upload.bytes));
}

}  // namespace agr::cuda
