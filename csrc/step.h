// The arguments of one step: plain structs that the host fills in and an executor reads, on a CPU or a GPU.
#pragma once

#include <cstdint>

#include "adamw.h"
#include "adan.h"
#include "numeric.h"

namespace agr {

enum class Type : std::uint8_t { float32, bfloat16, float16, float64 };

AGR_INLINE constexpr int bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// The element types of one tensor's update. The state has the parameter's type; gradients have that type or float32.
struct Types {
    Type parameter, gradient, state;
};

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
    std::int64_t elements;

    // The span of `count` elements that starts at element `first`.
    AGR_INLINE Span part(const Types& types, int states, std::int64_t first, std::int64_t count) const {
        Span span{};
        span.parameter = static_cast<char*>(parameter) + first * bytes_of(types.parameter);
        span.gradient = static_cast<const char*>(gradient) + first * bytes_of(types.gradient);
        for (int i = 0; i < states; ++i) span.state[i] = static_cast<char*>(state[i]) + first * bytes_of(types.state);
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
    double t;     // Adan's step count, starting at 1
    double sign;  // -1 for maximize, otherwise 1
};

// The sums of |g| and of g^2 over a gradient, or over a part of one. `squares` is only computed for clipping by the
// norm.
struct Sums {
    double abs_sum = 0;
    double squares = 0;
};

}  // namespace agr
