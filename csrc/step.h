// The arguments of one step: plain structs that the host fills in and an executor, on a CPU or a GPU, reads.
#pragma once

#include <cstdint>

#include "adamw.h"
#include "adan.h"
#include "numeric.h"

namespace agr {

enum class Type : std::uint8_t { float32, bfloat16, float16, float64 };

AGR_INLINE constexpr int bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// The types that a tensor's update is compiled for: gradients have the parameter's type or float32, and state its own.
struct Types {
    Type parameter, gradient, state;
};

enum class Rule : std::uint8_t { adamw, adamw_amsgrad, adan, regularize };
constexpr int rules = 4;

constexpr int most_states = 4;

AGR_INLINE constexpr int states_of(Rule rule) {
    return rule == Rule::adan ? 4 : rule == Rule::adamw_amsgrad ? 3 : rule == Rule::adamw ? 2 : 0;
}

// Where the elements of a tensor, or of one chunk of it, are.
struct Span {
    void* parameter;
    const void* gradient;
    void* state[most_states];
    std::int64_t elements;

    // The `count` elements that start at element `first`.
    AGR_INLINE Span part(const Types& types, int states, std::int64_t first, std::int64_t count) const {
        Span span{};
        span.parameter = static_cast<char*>(parameter) + first * bytes_of(types.parameter);
        span.gradient = static_cast<const char*>(gradient) + first * bytes_of(types.gradient);
        for (int i = 0; i < states; ++i) span.state[i] = static_cast<char*>(state[i]) + first * bytes_of(types.state);
        span.elements = count;
        return span;
    }
};

// One tensor of a step, as it is described once for a plan.
struct Tensor {
    Span span;  // its gradient is given anew with every step, and null in a step for which it has none
    Types types;
    Rule rule;
    std::int32_t group;
    float* step;  // the parameter's step count, which a step reads and raises; null for Adan, where the group has it
    std::int32_t index;  // of the parameter among all of the optimizer's
};

// What a group says in one step.
struct Group {
    AdamWOptions adamw;  // for its rule, the options; the other rule's are not read
    AdanOptions adan;
    double t;     // Adan's step count, from 1
    double sign;  // -1 for maximize, else 1
};

// What is known of a gradient, or of a part of it, before its update.
struct Sums {
    double magnitudes = 0;
    double squares = 0;
};

}  // namespace agr
