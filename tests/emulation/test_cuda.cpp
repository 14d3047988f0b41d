// Tests of the CUDA executor and of its kernels' own source on host threads. They are compared with the equations in
// long double. tests/test_native.py builds and runs this program with AddressSanitizer, UndefinedBehaviorSanitizer and
// ThreadSanitizer.
//
// Usage: test_cuda [number of random models [seed]]
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../../csrc/cuda/executor.h"
#include "../../csrc/cuda/intrinsics.h"
#include "../native/model.h"
#include "host_launcher.h"

int failures = 0;
int checks = 0;
std::mt19937_64 random_bits;

using namespace agr;

namespace {

// One launch of a model: the tensors that use the same kernel, with their executor and its table.
struct Launch {
    std::vector<Model::Tensor*> tensors;
    std::unique_ptr<cuda::Executor> executor;
    std::unique_ptr<void, decltype(&std::free)> table{nullptr, &std::free};
    double squares = 0;

    std::vector<const void*> gradients() const {
        std::vector<const void*> addresses;
        for (auto* tensor : tensors) addresses.push_back(tensor->address());
        return addresses;
    }
};

// The values that can be in device memory instead of in the arguments of the launch.
struct Device {
    float count = 0;
    double lr = 0;
    float grad_scale = 1, found_inf = 0;
    double clip = 1;
    bool has_count = false, has_lr = false, has_scale = false;
};

std::vector<Launch> launches_of(Model& model, int blocks, cuda::HostLauncher& launcher,
                                std::uint32_t tactics = cuda::all_tactics) {
    std::map<std::tuple<Type, Type>, Launch> by_types;
    std::map<const Model::Tensor*, std::int32_t> index;
    for (auto& tensor : model.tensors) {
        by_types[{tensor->type, tensor->gradient.type}].tensors.push_back(tensor.get());
        index.emplace(tensor.get(), static_cast<std::int32_t>(index.size()));
    }
    std::vector<Launch> launches;
    for (auto& [types, launch] : by_types) {
        std::vector<Plan::Tensor> planned;
        std::vector<agr::Tensor> rows;
        for (auto* tensor : launch.tensors) {
            planned.push_back({tensor->parameter.elements, bytes_of(tensor->gradient.type), tensor->regularize});
            agr::Tensor row{};
            row.span.parameter = tensor->parameter.data();
            for (std::size_t k = 0; k < tensor->states.size(); ++k) row.span.state[k] = tensor->states[k].data();
            row.span.elements = tensor->parameter.elements;
            row.types = {tensor->type, tensor->gradient.type, tensor->type};
            row.rule = model.rule;
            row.step = model.rule == Rule::adan ? nullptr : &tensor->step;
            row.index = index[tensor];
            rows.push_back(row);
        }
        launch.executor = std::make_unique<cuda::Executor>(Plan(std::move(planned), model.limits), std::move(rows), 1,
                                                           0, blocks, 1 << 16, launcher, tactics);
        const auto bytes = launch.executor->table();
        launch.table.reset(std::aligned_alloc(256, bytes.size()));
        std::memcpy(launch.table.get(), bytes.data(), bytes.size());
        launch.executor->attach(launch.table.get());
        launches.push_back(std::move(launch));
    }
    return launches;
}

void step(Model& model, std::vector<Launch>& launches, Device& device, int t) {
    model.group.t = t;
    cuda::DeviceGroup group{model.group, nullptr, Type::float64, nullptr, false};
    if (device.has_lr) {
        device.lr = model.rule == Rule::adan ? model.group.adan.lr : model.group.adamw.lr;
        group.lr = &device.lr;
        group.group.adan.lr = group.group.adamw.lr = 1e9;
    }
    if (device.has_count) {
        group.count = &device.count;
        group.group.t = 77;
    }
    cuda::Settings settings;
    if (device.has_scale) {
        settings.grad_scale = &device.grad_scale;
        settings.found_inf = &device.found_inf;
    }
    const bool together = model.clip && launches.size() > 1;
    if (model.clip) {
        settings.max_grad_norm = max_norm;
        settings.clip_eps = 1e-8;
    }
    if (together) {
        double squares = 0;
        for (Launch& launch : launches) {
            settings.squares = &launch.squares;
            launch.executor->launch(launch.gradients().data(), {group}, settings, cuda::Phase::reduce, nullptr);
            squares += launch.squares;
        }
        device.clip = std::min(1.0, max_norm / (std::sqrt(squares) + 1e-8));
        settings.squares = nullptr;
        settings.clip = &device.clip;
    }
    for (std::size_t i = 0; i < launches.size(); ++i) {
        group.increment_count = i + 1 == launches.size();
        launches[i].executor->launch(launches[i].gradients().data(), {group}, settings,
                                     together ? cuda::Phase::update : cuda::Phase::all, nullptr);
    }
}

// The relative error of the norm that a model's gradients are clipped by: the squares of float32 and 16-bit gradients
// are added in float32, up to eight of them without compensation. Those of float64 are not.
double norm_error(const Model& model) {
    for (const auto& tensor : model.tensors)
        if (model.clip && tensor->type != Type::float64) return 8 * 0x1p-25;
    return 0;
}

std::string bytes_of_all(const Model& model) {
    std::string bytes;
    auto append = [&bytes](const Stored& stored) {
        bytes.append(reinterpret_cast<const char*>(stored.data()), stored.size());
    };
    for (const auto& tensor : model.tensors) {
        append(tensor->parameter);
        append(tensor->gradient);
        for (const auto& state : tensor->states) append(state);
        bytes.append(reinterpret_cast<const char*>(&tensor->step), sizeof(float));
    }
    return bytes;
}

void test_models(int rounds) {
    for (int round = 0; round < rounds; ++round) {
        for (Rule rule : {Rule::adamw, Rule::adamw_amsgrad, Rule::adan}) {
            Model model = random_model(rule, round % 2 == 0, false);  // no kernel takes float32 gradients of float16
            cuda::HostLauncher launcher;
            Device device;
            device.has_lr = up_to(1) != 0;
            device.has_scale = up_to(1) != 0;
            // A skipped step is not counted, and only the device knows about it. So the count must be on the device.
            device.has_count = rule == Rule::adan && (device.has_scale || up_to(1) != 0);
            if (device.has_scale) model.grad_scale = device.grad_scale = up_to(1) ? 4.0f : 3.0f;
            // Every other model leaves tactics out.
            const auto tactics = round % 2 ? cuda::all_tactics : static_cast<std::uint32_t>(up_to(cuda::all_tactics));
            auto launches = launches_of(model, 1 + static_cast<int>(up_to(4)), launcher, tactics);
            if (launches.empty()) continue;
            for (int t = 1; t <= 4;) {
                new_gradients(model, model.grad_scale);
                device.found_inf = device.has_scale && up_to(3) == 0 ? 1.0f : 0.0f;
                const std::string before = bytes_of_all(model);
                step(model, launches, device, t);
                if (device.found_inf != 0) {
                    CHECK(bytes_of_all(model) == before, "a skipped step changed something");
                    CHECK(!device.has_count || device.count == static_cast<float>(t - 1), "it was counted");
                    continue;
                }
                step_by_definition(model, t);
                compare(model, "cuda", norm_error(model));
                for (auto& tensor : model.tensors)
                    CHECK(rule == Rule::adan || tensor->step == static_cast<float>(tensor->steps), "step %g",
                          tensor->step);
                CHECK(!device.has_count || device.count == static_cast<float>(t), "count %g", device.count);
                ++t;
            }
            CHECK(launcher.uploads == 0, "something was uploaded");
        }
    }
}

// A model that is large enough for tensors of several segments, with a window and chunks so small that blocks often
// wait for each other.
Model large_model(bool clip) {
    Model model(Rule::adan);
    model.clip = clip;
    model.limits = {61, 9000, 1000, clip};
    model.group = {{}, {1e-2, 0.98, 0.92, 0.99, 1e-8, 0.1, 0}, 0, 1};
    std::mt19937_64 same_bits(7);
    for (std::int64_t elements : {1, 64, 9000, 0, 61 * 64, 61 * 64 + 1, 61, 62, 31, 8000, 5}) {
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

std::string bytes_after(int steps, int blocks, bool clip, unsigned seed) {
    Model model = large_model(clip);
    cuda::HostLauncher launcher;
    launcher.seed = seed;
    Device device;
    auto launches = launches_of(model, blocks, launcher);
    for (int t = 1; t <= steps; ++t) step(model, launches, device, t);
    CHECK(launcher.steps == steps, "one launch a step");
    return bytes_of_all(model);
}

void test_determinism(int rounds) {
    for (bool clip : {false, true}) {
        const std::string once = bytes_after(2, 1, clip, 1);
        for (int blocks : {2, 3, 5})
            CHECK(bytes_after(2, blocks, clip, 1) == once, "%d blocks give other bits", blocks);
        cuda::HostBlock::stalls = true;
        for (int round = 0; round < rounds; ++round)
            CHECK(bytes_after(2, 2 + round % 3, clip, 100u + static_cast<unsigned>(round)) == once,
                  "stalls give other bits, round %d", round);
        cuda::HostBlock::stalls = false;
    }
}

// Gradient addresses that do not fit into the launch's arguments are uploaded, and uploaded again only when they
// change.
void test_many_tensors() {
    Model model(Rule::adamw);
    model.limits = {64, 1000, 0, false};
    model.group = {{1e-2, 0.9, 0.99, 1e-8, 0.1}, {}, 0, 1};
    for (int i = 0; i < 700; ++i) {
        auto tensor = std::make_unique<Model::Tensor>(
            Model::Tensor{Type::float32, true, Stored(Type::float32, 3), Stored(Type::float32, 3)});
        for (int k = 0; k < 2; ++k) add_state(*tensor, model.rule, k);
        for (int j = 0; j < 3; ++j) tensor->parameter.set(j, normal());
        for (int j = 0; j < 3; ++j) tensor->p.push_back(tensor->parameter.get(j));
        model.tensors.push_back(std::move(tensor));
    }
    cuda::HostLauncher launcher;
    Device device;
    auto launches = launches_of(model, 2, launcher);
    constexpr std::int64_t each = (700 * 8 + cuda::Upload::capacity - 1) / cuda::Upload::capacity;
    auto one = [&](int t, std::int64_t uploads, const char* what) {
        new_gradients(model, 1, false);
        step(model, launches, device, t);
        step_by_definition(model, t);
        compare(model, what);
        CHECK(launcher.uploads == uploads, "%s: %" PRId64 " uploads", what, launcher.uploads);
    };
    one(1, each, "first step");
    one(2, each, "unchanged");
    auto& moved = *model.tensors[650];
    moved.gradient = Stored(Type::float32, 3);
    one(3, 2 * each, "moved");
    launcher.capturing = true;
    one(4, 3 * each, "captured");
    launcher.capturing = false;
    one(5, 4 * each, "after a capture");
    one(6, 5 * each, "after a possible replay");
}

void test_mistakes() {
    cuda::HostLauncher launcher;
    auto refused = [](auto make) {
        try {
            make();
        } catch (const std::exception&) {
            return true;
        }
        return false;
    };
    agr::Tensor row{};
    row.types = {Type::float32, Type::float32, Type::float32};
    agr::Tensor other = row;
    other.types = {Type::float64, Type::float64, Type::float64};
    const Plan one({{1, 4, true}}, {1, 0, 0, false}), two({{1, 4, true}, {1, 4, true}}, {1, 0, 0, false});
    CHECK(refused([&] { cuda::Executor(one, {}, 1, 0, 1, 1 << 16, launcher); }), "no tensors");
    CHECK(refused([&] { cuda::Executor(two, {row}, 1, 0, 1, 1 << 16, launcher); }), "another number of tensors");
    CHECK(refused([&] { cuda::Executor(two, {row, other}, 1, 0, 1, 1 << 16, launcher); }), "two types");
    agr::Tensor odd = row;
    odd.types.state = Type::float16;
    CHECK(refused([&] { cuda::Executor(one, {odd}, 1, 0, 1, 1 << 16, launcher); }), "types that no kernel takes");
    const Plan apart({{1, 4, true}}, {1, 0, 0, false, true});
    CHECK(refused([&] { cuda::Executor(apart, {row}, 1, 0, 1, 1 << 16, launcher); }), "reductions apart from updates");
    const Plan huge({{1, 4, true}}, {(std::int64_t{1} << 30) + 1, 0, 0, false});
    CHECK(refused([&] { cuda::Executor(huge, {row}, 1, 0, 1, 1 << 16, launcher); }), "a chunk too large for an index");
    cuda::Executor unattached(one, {row}, 1, 0, 1, 1 << 16, launcher);
    const void* gradient = nullptr;
    CHECK(refused([&] { unattached.launch(&gradient, {{}}, {}, cuda::Phase::all, nullptr); }), "no table");
    CHECK(launcher.steps == 0, "a mistake was launched");
}

}  // namespace

int main(int argc, char** argv) {
    const int models = argc > 1 ? std::atoi(argv[1]) : 25;
    random_bits.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
    test_models(models);
    cuda::HostBlock::stalls = true;
    test_models(models / 3 + 1);
    cuda::HostBlock::stalls = false;
    test_determinism(models / 3 + 1);
    test_many_tensors();
    test_mistakes();
    std::printf("cuda: %d checks, %d failures\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
