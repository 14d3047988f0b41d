// The native core without Python: conversions, plans, and the CPU executor beside the equations in long double. It is
// built and run under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer by tests/test_native.py.
//
// Usage: test_core [how many random models [the seed of the random numbers]]
#include <cstdlib>

#include "../../csrc/cpu/kernels.h"
#include "check.h"

int failures = 0;
int checks = 0;
std::mt19937_64 random_bits;

int main(int argc, char** argv) {
    const int models = argc > 1 ? std::atoi(argv[1]) : 25;
    random_bits.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
    test_numbers();
    test_plans();
    test_executor(models);
    std::printf("%s: %d checks, %d failures\n", agr::cpu::instruction_set().name, checks, failures);
    return failures == 0 ? 0 : 1;
}
