// Tests of the native core without Python: conversions, plans, and the CPU executor, which is compared with the
// equations in long double. tests/test_native.py builds and runs this program with AddressSanitizer,
// UndefinedBehaviorSanitizer and ThreadSanitizer.
//
// Usage: test_core [number of random models [seed]]
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
