// Random models, and the update equations in long double, with which the tests compare both executors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/agr.h"
#include "check.h"

namespace agr {

// An array of a storage type. Its memory ends with its last element, so that a sanitizer reports every access beyond
// it. The array starts `shift` elements after an address that is aligned for all types.
struct Stored {
    Type type;
    std::int64_t elements, shift;
    std::unique_ptr<unsigned char[]> bytes;

    Stored(Type t, std::int64_t n, std::int64_t s = 0)
        : type(t), elements(n), shift(s), bytes(new unsigned char[(s + n) * bytes_of(t)]()) {}

    unsigned char* data() const { return bytes.get() + shift * bytes_of(type); }
    std::size_t size() const { return static_cast<std::size_t>(elements * bytes_of(type)); }

    double get(std::int64_t i) const {
        const unsigned char* at = data() + i * bytes_of(type);
        if (type == Type::float64) return read<double>(at);
        if (type == Type::float32) return read<float>(at);
        const std::uint32_t bits = read<std::uint16_t>(at);
        return type == Type::bfloat16 ? widened_bfloat16<float>(bits) : widened_float16<float>(bits);
    }
    void set(std::int64_t i, double value) {
        unsigned char* at = data() + i * bytes_of(type);
        const auto single = static_cast<float>(value);
        const auto half = static_cast<std::uint16_t>(type == Type::bfloat16 ? rounded_bfloat16<std::uint32_t>(single)
                                                                            : rounded_float16<std::uint32_t>(single));
        if (type == Type::float64)
            std::memcpy(at, &value, 8);
        else if (type == Type::float32)
            std::memcpy(at, &single, 4);
        else
            std::memcpy(at, &half, 2);
    }

private:
    template <class T>
    static T read(const unsigned char* at) {
        T value;
        std::memcpy(&value, at, sizeof(value));
        return value;
    }
};

struct Model {
    Rule rule;
    bool clip = false;
    Plan::Limits limits{};
    Group group{};
    double grad_scale = 1;  // gradients are divided by this
    struct Tensor {
        Type type;
        bool regularize;
        Stored parameter, gradient;
        std::vector<Stored> states{};
        float step = 0;
        int steps = 0;        // the step count of the equations
        bool present = true;  // whether it has a gradient in this step

        const void* address() const { return present ? gradient.data() : nullptr; }
        // The expected parameter and states, from the equations.
        std::vector<long double> p{};
        std::vector<std::vector<long double>> s{};
        // The largest absolute value of p, and of each of s, before the step. Where a sum cancels, its rounding error
        // is relative to this.
        std::vector<long double> largest{};
    };
    std::vector<std::unique_ptr<Tensor>> tensors;

    explicit Model(Rule r) : rule(r) {}
};

inline long double largest_of(const std::vector<long double>& values) {
    long double largest = 0;
    for (long double value : values) largest = std::max(largest, std::fabs(value));
    return largest;
}

constexpr double max_norm = 0.7;

// Adds state `k` with its initial value: NaN for Adan's previous gradient, and 0 for all others.
inline void add_state(Model::Tensor& tensor, Rule rule, int k, std::int64_t shift = 0) {
    const std::int64_t elements = tensor.parameter.elements;
    const double initial = rule == Rule::adan && k == 3 ? std::nan("") : 0.0;
    tensor.states.emplace_back(tensor.type, elements, shift);
    for (std::int64_t i = 0; i < elements; ++i) tensor.states.back().set(i, initial);
    tensor.s.emplace_back(elements, initial);
}

// Sets new gradients: normal random numbers times `scale`. If `some_missing`, some tensors get none.
inline void new_gradients(Model& model, double scale = 1, bool some_missing = true) {
    for (auto& tensor : model.tensors) {
        tensor->present = !some_missing || up_to(4) != 0;
        for (std::int64_t i = 0; i < tensor->gradient.elements; ++i) tensor->gradient.set(i, scale * normal());
    }
}

// A model of random tensors. If `mixed`, each tensor has its own random types; otherwise all have the same types. Some
// of 16 bits have float32 gradients, those of float16 only if `wide_float16`.
inline Model random_model(Rule rule, bool mixed = true, bool wide_float16 = true) {
    Model model(rule);
    model.clip = up_to(2) == 0;
    const std::int64_t chunk = 1 + up_to(300);
    model.limits = {chunk, up_to(4000), up_to(2000), model.clip};
    const double weight_decay = 0.1, no_prox = static_cast<double>(up_to(1));
    model.group = {{1e-2, 0.9, 0.99, 1e-8, weight_decay},
                   {1e-2, 0.98, 0.92, 0.99, 1e-8, weight_decay, no_prox},
                   0,
                   up_to(1) ? 1.0 : -1.0};
    const Type types[] = {Type::float32, Type::float64, Type::bfloat16, Type::float16};
    const Type one = types[up_to(3)];
    const bool wide = up_to(1) != 0;
    for (const auto& sized : random_tensors(chunk)) {
        const Type type = mixed ? types[up_to(3)] : one;
        const bool may_be_wide = type == Type::bfloat16 || (type == Type::float16 && wide_float16);
        const Type gradient = may_be_wide && (mixed ? up_to(1) != 0 : wide) ? Type::float32 : type;
        auto shift = [] { return up_to(3) == 0 ? 1 + up_to(8) : 0; };
        auto tensor = std::make_unique<Model::Tensor>(Model::Tensor{
            type, sized.regularize, Stored(type, sized.elements, shift()), Stored(gradient, sized.elements, shift())});
        for (std::int64_t i = 0; i < sized.elements; ++i) {
            tensor->parameter.set(i, normal());
            tensor->p.push_back(tensor->parameter.get(i));
        }
        for (int k = 0; k < states_of(rule); ++k) add_state(*tensor, rule, k, shift());
        model.tensors.push_back(std::move(tensor));
    }
    return model;
}

// Step `t` of the equations, on the stored gradients and the expected values of p and s.
inline void step_by_definition(Model& model, int t) {
    long double squares = 0;
    for (auto& tensor : model.tensors)
        for (std::int64_t i = 0; i < tensor->gradient.elements && tensor->present; ++i)
            squares += std::pow((long double)tensor->gradient.get(i), 2);
    const long double norm = std::sqrt(squares) / model.grad_scale;
    const long double clip = (model.clip ? std::min(1.0L, max_norm / (norm + 1e-8L)) : 1.0L) / model.grad_scale;
    for (auto& tensor : model.tensors) {
        auto& s = tensor->s;
        tensor->largest = {largest_of(tensor->p)};
        for (const auto& state : s) tensor->largest.push_back(largest_of(state));
        if (!tensor->present) continue;
        ++tensor->steps;
        const std::int64_t n = tensor->parameter.elements;
        std::vector<long double> g(n);
        long double sum = 0;
        for (std::int64_t i = 0; i < n; ++i) sum += std::fabs(g[i] = clip * model.group.sign * tensor->gradient.get(i));
        for (std::int64_t i = 0; i < n && tensor->regularize && sum > 0; ++i) g[i] *= 1 - std::fabs(g[i]) / sum;
        // Adan's exp_avg_diff averages differences of gradients, whose rounding errors are relative to the gradients.
        if (model.rule == Rule::adan) {
            const long double taken = (1 - model.group.adan.beta2) * std::max(largest_of(g), largest_of(s[3]));
            tensor->largest[2] = std::max(tensor->largest[2], taken);
        }
        for (std::int64_t i = 0; i < n; ++i) {
            long double& p = tensor->p[i];
            if (model.rule == Rule::adan) {
                const AdanOptions& o = model.group.adan;
                const long double d = tensor->steps == 1 ? 0 : g[i] + s[3][i];
                s[0][i] = o.beta1 * s[0][i] + (1 - o.beta1) * g[i];
                s[1][i] = o.beta2 * s[1][i] + (1 - o.beta2) * d;
                s[2][i] = o.beta3 * s[2][i] + (1 - o.beta3) * std::pow(g[i] + o.beta2 * d, 2);
                s[3][i] = -g[i];
                const long double denominator =
                    std::sqrt(s[2][i]) / std::sqrt(1 - std::pow((long double)o.beta3, t)) + o.eps;
                const long double step =
                    o.lr / (1 - std::pow((long double)o.beta1, t)) * s[0][i] / denominator +
                    o.lr * o.beta2 / (1 - std::pow((long double)o.beta2, t)) * s[1][i] / denominator;
                p = o.no_prox ? p * (1 - o.lr * o.weight_decay) - step : (p - step) / (1 + o.lr * o.weight_decay);
            } else {
                const AdamWOptions& o = model.group.adamw;
                p *= 1 - o.lr * o.weight_decay;
                s[0][i] += (1 - o.beta1) * (g[i] - s[0][i]);
                s[1][i] = o.beta2 * s[1][i] + (1 - o.beta2) * g[i] * g[i];
                long double v = s[1][i];
                if (model.rule == Rule::adamw_amsgrad) v = s[2][i] = std::max(s[2][i], v);
                p -= o.lr / (1 - std::pow((long double)o.beta1, tensor->steps)) * s[0][i] /
                     (std::sqrt(v) / std::sqrt(1 - std::pow((long double)o.beta2, tensor->steps)) + o.eps);
            }
        }
    }
}

inline double unit(Type type) {
    return type == Type::float64 ? 0x1p-53 : type == Type::float32 ? 0x1p-24 : type == Type::float16 ? 0x1p-11 : 0x1p-8;
}

// Compares the stored values with the expected ones. Then replaces the expected values by the stored ones, so that
// rounding errors do not add up over the steps. `norm_error` is the relative error of the norm that gradients were
// clipped by; `least` allows an error in denormal results.
inline void compare(Model& model, const char* what, double norm_error = 0) {
    for (auto& tensor : model.tensors) {
        auto check = [&](const Stored& stored, std::vector<long double>& expected, long double before,
                         const char* name) {
            const long double largest = std::max(before, largest_of(expected));
            for (std::int64_t i = 0; i < stored.elements; ++i) {
                if (std::isnan(stored.get(i)) && std::isnan(expected[i])) continue;
                const long double error = std::fabs(stored.get(i) - expected[i]);
                const double least = stored.type == Type::float16 ? 0x1p-24 : 0x1p-126;
                CHECK(error <= (16 * unit(stored.type) + 2 * norm_error) * largest + least,
                      "%s, %s[%" PRId64 "]: %.12Lg instead of %.12Lg", what, name, i, (long double)stored.get(i),
                      expected[i]);
                expected[i] = stored.get(i);
            }
        };
        check(tensor->parameter, tensor->p, tensor->largest[0], "parameter");
        for (std::size_t k = 0; k < tensor->states.size(); ++k)
            check(tensor->states[k], tensor->s[k], tensor->largest[k + 1], "state");
    }
}

}  // namespace agr
