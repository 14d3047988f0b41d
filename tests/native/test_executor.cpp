// Tests of the CPU executor. It is compared with the equations in long double, for every rule, type and option, and
// with different numbers of threads.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/executor.h"
#include "model.h"

using namespace agr;

namespace {

cpu::Executor executor_of(Model& model) {
    std::vector<Plan::Tensor> planned;
    std::vector<agr::Tensor> rows;
    for (auto& tensor : model.tensors) {
        planned.push_back({tensor->parameter.elements, bytes_of(tensor->gradient.type), tensor->regularize});
        agr::Tensor row{};
        row.span.parameter = tensor->parameter.data();
        for (std::size_t k = 0; k < tensor->states.size(); ++k) row.span.state[k] = tensor->states[k].data();
        row.span.elements = tensor->parameter.elements;
        row.types = {tensor->type, tensor->gradient.type, tensor->type};
        row.rule = model.rule;
        row.step = model.rule == Rule::adan ? nullptr : &tensor->step;
        row.index = static_cast<std::int32_t>(rows.size());
        rows.push_back(row);
    }
    return cpu::Executor(Plan(std::move(planned), model.limits), std::move(rows));
}

void step(cpu::Executor& executor, Model& model, int t, int threads) {
    std::vector<const void*> gradients;
    for (auto& tensor : model.tensors) gradients.push_back(tensor->address());
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
                new_gradients(model);
                step(executor, model, t, 1 + static_cast<int>(up_to(7)));
                step_by_definition(model, t);
                compare(model, what);
                for (auto& tensor : model.tensors)
                    CHECK(rule == Rule::adan || tensor->step == static_cast<float>(tensor->steps), "step %g",
                          tensor->step);
            }
        }
    }
}

// A model that is large enough for several threads, with a window and chunks so small that threads often wait for each
// other.
Model large_model() {
    Model model(Rule::adan);
    model.limits = {509, 40000, 0, false};
    model.group = {{}, {1e-2, 0.98, 0.92, 0.99, 1e-8, 0.1, 0}, 0, 1};
    std::mt19937_64 same_bits(7);
    for (std::int64_t elements : {1, 64, 70000, 0, 200003, 509, 510, 31, 90001, 5, 150000}) {
        auto tensor = std::make_unique<Model::Tensor>(
            Model::Tensor{Type::float32, true, Stored(Type::float32, elements), Stored(Type::float32, elements)});
        for (int k = 0; k < 4; ++k) add_state(*tensor, model.rule, k);
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
        bytes.append(reinterpret_cast<const char*>(tensor->parameter.data()), tensor->parameter.elements * 4);
    return bytes;
}

void test_determinism() {
    for (bool clip : {false, true}) {
        const std::string once = bytes_after(6, 1, clip);
        for (int threads : {2, 3, 8, 17})
            CHECK(bytes_after(6, threads, clip) == once, "%d threads give other bits", threads);
    }
}

// All threads use the caller's rounding mode. Otherwise the bits would depend on which thread drew which ticket.
void test_rounding_of_the_caller() {
    const std::string nearest = bytes_after(3, 1);
    std::fesetround(FE_UPWARD);
    const std::string upward = bytes_after(3, 1);
    for (int threads : {2, 8}) CHECK(bytes_after(3, threads) == upward, "%d threads round otherwise", threads);
    std::fesetround(FE_TONEAREST);
    CHECK(upward != nearest, "the rounding makes no difference");
    CHECK(bytes_after(3, 8) == nearest, "threads keep to another caller's rounding");
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
        agr::Tensor row{};
        row.rule = Rule::regularize;
        row.types = {type, type, type};
        row.span.elements = 1003;
        cpu::Executor executor(Plan({{1003, bytes_of(type), true}}, {100, 1000, 0, false}), {row});
        const void* address = gradient.data();
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
        agr::Tensor row{};
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
    test_child_process();  // before this process has started the pool's threads
    test_determinism();
    test_rounding_of_the_caller();
    test_two_optimizers_at_once();
    test_child_process();
    test_regularize();
    test_mistakes();
}
