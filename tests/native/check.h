// Helpers of the test programs: checks, random numbers and random tensors.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/plan.h"

extern int failures, checks;
extern std::mt19937_64 random_bits;

#define CHECK(condition, ...)                                                    \
    do {                                                                         \
        ++checks;                                                                \
        if (!(condition)) {                                                      \
            ++failures;                                                          \
            std::printf("%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                            \
            std::printf("\n");                                                   \
        }                                                                        \
    } while (false)

inline double normal() { return std::normal_distribution<double>()(random_bits); }
inline std::int64_t up_to(std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(0, most)(random_bits);
}

// Random tensors, many of them with sizes at or near the boundaries of chunks and vectors.
inline std::vector<agr::Plan::Tensor> random_tensors(std::int64_t chunk) {
    std::vector<agr::Plan::Tensor> tensors(up_to(12));
    for (auto& tensor : tensors) {
        const std::int64_t sizes[] = {0, 1, chunk - 1, chunk, chunk + 1, up_to(7 * chunk), 3 * chunk};
        tensor = {std::max<std::int64_t>(0, sizes[up_to(6)]), up_to(1) ? 4 : 2, up_to(3) != 0};
    }
    return tensors;
}

void test_numbers();
void test_plans();
void test_executor(int models);
