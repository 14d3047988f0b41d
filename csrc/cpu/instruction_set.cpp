// Chooses among the compiled instruction sets when the program runs.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace agr::cpu {
namespace {

struct Candidate {
    InstructionSet set;
    bool runs;
};

const InstructionSet& choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    static const Candidate candidates[] = {
        {{"avx512", avx512_kernels},
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
        {{"avx2", avx2_kernels},
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
        {{"portable", portable_kernels}, true},
    };
#else
    static const Candidate candidates[] = {{{"portable", portable_kernels}, true}};
#endif
    const char* wanted = std::getenv("AGR_CPU_ISA");
    if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
    std::string names;
    for (const Candidate& candidate : candidates) {
        if (!candidate.runs) continue;
        if (wanted == nullptr || std::strcmp(wanted, candidate.set.name) == 0) return candidate.set;
        names += (names.empty() ? "" : ", ") + std::string(candidate.set.name);
    }
    throw std::runtime_error("AGR_CPU_ISA is '" + std::string(wanted) + "'; this processor and build have " + names);
}

}  // namespace

const InstructionSet& instruction_set() {
    static const InstructionSet& chosen = choose();
    return chosen;
}

}  // namespace agr::cpu
