// The arguments of one step: plain structs that the host fills in and an executor reads, on a CPU or a GPU.
#pragma once

#include <cstdint>

#include "adamw.h"
#include "adan.h"
#include "numeric.h"

namespace agr {

// code8 is an element of 8 bits, which has a meaning together with the scale of its block (see quantization.h).
enum class Type : std::uint8_t { float32, bfloat16, float16, float64, code8 };

AGR_INLINE constexpr int bytes_of(Type type) {
    return type == Type::float64 ? 8 : type == Type::float32 ? 4 : type == Type::code8 ? 1 : 2;
}

// What one tensor's update reads and writes.
struct Types {
    Type parameter, gradient, state;
    bool master = false;      // the parameter is the rounded copy of a float32 master
    bool stochastic = false;  // what is stored in bfloat16 is rounded stochastically (see rounding.h)
};

constexpr bool operator==(const Types& a, const Types& b) {
    return a.parameter == b.parameter && a.gradient == b.gradient && a.state == b.state && a.master == b.master &&
           a.stochastic == b.stochastic;
}

// The number of neighbouring elements that share a scale, where the state consists of codes.
constexpr int scale_block = 256;

enum class Rule : std::uint8_t { adamw, adamw_amsgrad, adan, regularize };
constexpr int rules = 4;  // the number of rules

constexpr int max_states = 4;  // the largest number of state tensors that a rule has

AGR_INLINE constexpr int states_of(Rule rule) {
    return rule == Rule::adan ? 4 : rule == Rule::adamw_amsgrad ? 3 : rule == Rule::adamw ? 2 : 0;
}

// The addresses of the elements of one tensor, or of one chunk of it.
struct Span {
    void* parameter;
    const void* gradient;
    void* state[max_states];
    float* scales[max_states];  // of codes
    float* master;              // or null
    std::int64_t elements;

    // The span of `count` elements that starts at element `first`, a multiple of scale_block if there are scales.
    AGR_INLINE Span part(const Types& types, int states, std::int64_t first, std::int64_t count) const {
        Span span{};
        span.parameter = static_cast<char*>(parameter) + first * bytes_of(types.parameter);
        span.gradient = static_cast<const char*>(gradient) + first * bytes_of(types.gradient);
        for (int i = 0; i < states; ++i) span.state[i] = static_cast<char*>(state[i]) + first * bytes_of(types.state);
        for (int i = 0; i < states; ++i)
            span.scales[i] = scales[i] == nullptr ? nullptr : scales[i] + first / scale_block;
        span.master = master == nullptr ? nullptr : master + first;
        span.elements = count;
        return span;
    }
};

// One tensor, described once for all steps of a plan.
struct Tensor {
    Span span;  // without the gradient, which every step passes anew: null if the tensor has none in that step
    Types types;
    Rule rule;
    std::int32_t group;
    float* step;  // the parameter's step count, read and incremented by a step; null for Adan, which counts by group
    std::int32_t index;  // of the parameter among all parameters of the optimizer
};

// The options of one parameter group in one step.
struct Group {
    AdamWOptions adamw;  // only the options of the rule in use are read
    AdanOptions adan;
    double t;                // Adan's step count, starting at 1
    double sign;             // -1 for maximize, otherwise 1
    std::uint64_t seed = 0;  // of stochastic rounding
};

// The sums of |g| and of g^2 over a gradient, or over a part of one. `squares` is only computed for clipping by the
// norm.
struct Sums {
    double abs_sum = 0;
    double squares = 0;
};

}  // namespace agr
