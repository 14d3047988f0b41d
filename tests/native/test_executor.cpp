// The CPU executor beside the equations in long double: every rule, type and option, with any number of threads.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/executor.h"
#include "check.h"

using namespace agr;

namespace {

// Memory of some type, exactly as long as needed, so that a sanitizer sees every element too far.
struct Stored {
    Type type;
    std::int64_t elements;
    std::unique_ptr<unsigned char[]> bytes;

    Stored(Type t, std::int64_t n) : type(t), elements(n), bytes(new unsigned char[n * bytes_of(t)]()) {}

    double get(std::int64_t i) const {
        const unsigned char* at = bytes.get() + i * bytes_of(type);
        if (type == Type::float64) return read<double>(at);
        if (type == Type::float32) return read<float>(at);
        const std::uint32_t bits = read<std::uint16_t>(at);
        return type == Type::bfloat16 ? widened_bfloat16<float>(bits) : widened_float16<float>(bits);
    }
    void set(std::int64_t i, double value) {
        unsigned char* at = bytes.get() + i * bytes_of(type);
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
    cpu::Group group{};
    struct Tensor {
        Type type;
        bool regularize;
        Stored parameter, gradient;
        std::vector<Stored> states;
        float step = 0;
        // What the equations say.
        std::vector<long double> p;
        std::vector<std::vector<long double>> s;
        // Of p and each of s, the largest value before the step: what roundings are measured by where a sum cancels.
        std::vector<long double> largest;
    };
    std::vector<std::unique_ptr<Tensor>> tensors;

    explicit Model(Rule r) : rule(r) {}
};

long double largest_of(const std::vector<long double>& values) {
    long double largest = 0;
    for (long double value : values) largest = std::max(largest, std::fabs(value));
    return largest;
}

constexpr double max_norm = 0.7;

Model random_model(Rule rule) {
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
    for (const auto& sized : random_tensors(chunk)) {
        const Type type = types[up_to(3)];
        const Type gradient = bytes_of(type) == 2 && up_to(1) ? Type::float32 : type;
        auto tensor = std::make_unique<Model::Tensor>(Model::Tensor{
            type, sized.regularize, Stored(type, sized.elements), Stored(gradient, sized.elements), {}, 0, {}, {}, {}});
        for (std::int64_t i = 0; i < sized.elements; ++i) {
            tensor->parameter.set(i, normal());
            tensor->p.push_back(tensor->parameter.get(i));
        }
        for (int k = 0; k < states_of(rule); ++k) {
            tensor->states.emplace_back(type, sized.elements);
            tensor->s.emplace_back(sized.elements, 0.0L);
        }
        model.tensors.push_back(std::move(tensor));
    }
    return model;
}

cpu::Executor executor_of(Model& model) {
    std::vector<Plan::Tensor> planned;
    std::vector<cpu::Tensor> rows;
    for (auto& tensor : model.tensors) {
        planned.push_back({tensor->parameter.elements, bytes_of(tensor->gradient.type), tensor->regularize});
        cpu::Tensor row{};
        row.span.parameter = tensor->parameter.bytes.get();
        for (std::size_t k = 0; k < tensor->states.size(); ++k) row.span.state[k] = tensor->states[k].bytes.get();
        row.span.elements = tensor->parameter.elements;
        row.types = {tensor->type, tensor->gradient.type, tensor->type};
        row.rule = model.rule;
        row.step = model.rule == Rule::adan ? nullptr : &tensor->step;
        row.fresh = true;
        rows.push_back(row);
    }
    return cpu::Executor(Plan(std::move(planned), model.limits), std::move(rows));
}

// One step of the equations of SPEC, without a thought to speed. The stored values are rounded to their type.
void step_by_definition(Model& model, int t) {
    long double squares = 0;
    for (auto& tensor : model.tensors)
        for (std::int64_t i = 0; i < tensor->gradient.elements; ++i)
            squares += std::pow((long double)tensor->gradient.get(i), 2);
    const long double clip = model.clip ? std::min(1.0L, max_norm / (std::sqrt(squares) + 1e-8L)) : 1.0L;
    for (auto& tensor : model.tensors) {
        const std::int64_t n = tensor->parameter.elements;
        std::vector<long double> g(n);
        long double sum = 0;
        for (std::int64_t i = 0; i < n; ++i) sum += std::fabs(g[i] = clip * model.group.sign * tensor->gradient.get(i));
        for (std::int64_t i = 0; i < n && tensor->regularize && sum > 0; ++i) g[i] *= 1 - std::fabs(g[i]) / sum;
        auto& s = tensor->s;
        tensor->largest = {largest_of(tensor->p)};
        for (const auto& state : s) tensor->largest.push_back(largest_of(state));
        // Adan's exp_avg_diff takes up a difference of gradients, each of which is rounded.
        if (model.rule == Rule::adan) {
            const long double taken = (1 - model.group.adan.beta2) * std::max(largest_of(g), largest_of(s[3]));
            tensor->largest[2] = std::max(tensor->largest[2], taken);
        }
        for (std::int64_t i = 0; i < n; ++i) {
            long double& p = tensor->p[i];
            if (model.rule == Rule::adan) {
                const AdanOptions& o = model.group.adan;
                const long double d = t == 1 ? 0 : g[i] + s[3][i];
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
                p -= o.lr / (1 - std::pow((long double)o.beta1, t)) * s[0][i] /
                     (std::sqrt(v) / std::sqrt(1 - std::pow((long double)o.beta2, t)) + o.eps);
            }
        }
    }
}

double unit(Type type) {
    return type == Type::float64 ? 0x1p-53 : type == Type::float32 ? 0x1p-24 : type == Type::float16 ? 0x1p-11 : 0x1p-8;
}

// Compares, and then goes on from what is stored, so that roundings do not add up. `least` is the size of a denormal.
void compare(Model& model, const char* what) {
    for (auto& tensor : model.tensors) {
        auto check = [&](const Stored& stored, std::vector<long double>& expected, long double before,
                         const char* name) {
            const long double largest = std::max(before, largest_of(expected));
            for (std::int64_t i = 0; i < stored.elements; ++i) {
                const long double error = std::fabs(stored.get(i) - expected[i]);
                const double least = stored.type == Type::float16 ? 0x1p-24 : 0x1p-126;
                CHECK(error <= 16 * unit(stored.type) * largest + least,
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

void step(cpu::Executor& executor, Model& model, int t, int threads) {
    std::vector<const void*> gradients;
    for (auto& tensor : model.tensors) gradients.push_back(tensor->gradient.bytes.get());
    model.group.t = t;
    double clip = 1;
    if (model.clip) clip = std::min(1.0, max_norm / (std::sqrt(executor.reduce(gradients.data(), threads)) + 1e-8));
    executor.update(gradients.data(), {model.group}, clip, threads);
}

void test_models(int rounds, const char* what) {
    for (int round = 0; round < rounds; ++round) {
        for (Rule rule : {Rule::adamw, Rule::adamw_amsgrad, Rule::adan}) {
            Model model = random_model(rule);
            cpu::Executor executor = executor_of(model);
            for (int t = 1; t <= 4; ++t) {
                for (auto& tensor : model.tensors)
                    for (std::int64_t i = 0; i < tensor->gradient.elements; ++i) tensor->gradient.set(i, normal());
                step(executor, model, t, 1 + static_cast<int>(up_to(7)));
                step_by_definition(model, t);
                compare(model, what);
                for (auto& tensor : model.tensors)
                    CHECK(rule == Rule::adan || tensor->step == static_cast<float>(t), "step %g", tensor->step);
            }
        }
    }
}

// A model large enough that several threads are at work, and windows and chunks small enough that they meet all the
// time.
Model large_model() {
    Model model(Rule::adan);
    model.limits = {509, 40000, 0, false};
    model.group = {{}, {1e-2, 0.98, 0.92, 0.99, 1e-8, 0.1, 0}, 0, 1};
    std::mt19937_64 same_bits(7);
    for (std::int64_t elements : {1, 64, 70000, 0, 200003, 509, 510, 31, 90001, 5, 150000}) {
        auto tensor = std::make_unique<Model::Tensor>(Model::Tensor{
            Type::float32, true, Stored(Type::float32, elements), Stored(Type::float32, elements), {}, 0, {}, {}, {}});
        for (int k = 0; k < 4; ++k) tensor->states.emplace_back(Type::float32, elements);
        for (std::int64_t i = 0; i < elements; ++i) {
            tensor->parameter.set(i, std::normal_distribution<double>()(same_bits));
            tensor->gradient.set(i, std::normal_distribution<double>()(same_bits));
        }
        model.tensors.push_back(std::move(tensor));
    }
    return model;
}

std::string bytes_after(int steps, int threads, bool clip = false) {
    Model model = large_model();
    model.limits.clip = model.clip = clip;
    cpu::Executor executor = executor_of(model);
    for (int t = 1; t <= steps; ++t) step(executor, model, t, threads);
    std::string bytes;
    for (auto& tensor : model.tensors)
        bytes.append(reinterpret_cast<const char*>(tensor->parameter.bytes.get()), tensor->parameter.elements * 4);
    return bytes;
}

void test_determinism() {
    for (bool clip : {false, true}) {
        const std::string once = bytes_after(6, 1, clip);
        for (int threads : {2, 3, 8, 17})
            CHECK(bytes_after(6, threads, clip) == once, "%d threads give other bits", threads);
    }
}

void test_two_optimizers_at_once() {
    const std::string alone = bytes_after(4, 3);
    std::vector<std::string> together(4);
    std::vector<std::thread> callers;
    for (auto& result : together) callers.emplace_back([&result] { result = bytes_after(4, 3); });
    for (auto& caller : callers) caller.join();
    for (const auto& result : together) CHECK(result == alone, "two at once give other bits");
}

void test_child_process() {
    const std::string before = bytes_after(2, 4);
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) _exit(bytes_after(2, 4) == before ? 0 : 1);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a step in a child process: status %d", status);
}

void test_regularize() {
    for (Type type : {Type::float32, Type::float64, Type::bfloat16, Type::float16}) {
        Stored gradient(type, 1003);
        std::vector<double> before(1003);
        double sum = 0;
        for (int i = 0; i < 1003; ++i) {
            gradient.set(i, normal());
            sum += std::fabs(before[i] = gradient.get(i));
        }
        cpu::Tensor row{};
        row.rule = Rule::regularize;
        row.types = {type, type, type};
        row.span.parameter = gradient.bytes.get();
        row.span.elements = 1003;
        cpu::Executor executor(Plan({{1003, bytes_of(type), true}}, {100, 1000, 0, false}), {row});
        const void* address = gradient.bytes.get();
        executor.update(&address, {{{}, {}, 0, 1}}, 1, 2);
        for (int i = 0; i < 1003; ++i) {
            const double expected = before[i] * (1 - std::fabs(before[i]) / sum);
            CHECK(std::fabs(gradient.get(i) - expected) <=
                      4 * unit(type) * std::fabs(expected) + (type == Type::float16 ? 0x1p-24 : 0),
                  "psi[%d]", i);
        }
    }
}

void test_mistakes() {
    bool refused = false;
    try {
        cpu::Executor(Plan({{1, 4, true}}, {1, 0, 0, false}), {});
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    CHECK(refused, "a plan for another number of tensors");
    refused = false;
    try {
        cpu::Tensor row{};
        row.types = {Type::float64, Type::float16, Type::float64};
        cpu::Executor(Plan({{1, 2, true}}, {1, 0, 0, false}), {row});
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    CHECK(refused, "types that no kernel takes");
}

}  // namespace

void test_executor(int models) {
    test_models(models, cpu::instruction_set().name);
    test_child_process();  // before this process has many threads
    test_determinism();
    test_two_optimizers_at_once();
    test_child_process();
    test_regularize();
    test_mistakes();
}
