// agr_cuda._C.CudaExecutor, and the launchers that may stand in for the CUDA runtime's.
#include "../cuda/executor.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "rows.h"
#include "watch.h"

namespace py = pybind11;

namespace agr::python {
namespace {

// The launcher of executors that are made from now on, and whether it stands in for the CUDA runtime's, on tensors in
// the host's memory.
struct {
    cuda::Launcher* launcher = nullptr;
    bool stands_in = false;
} current;

cuda::Launcher& launcher() {
    if (current.launcher == nullptr)
        throw std::runtime_error(std::string("the CUDA backend is not there: ") + AGR_LEFT_OUT);
    return *current.launcher;
}

// None for the CUDA runtime's, "nothing" for one that launches nothing, or a capsule with a Launcher of a test.
void use_launcher(const py::object& which) {
    static cuda::Rehearsal rehearsal;
    cuda::Launcher* chosen = nullptr;
    if (which.is_none()) {
#if defined(AGR_CUDA_ARCHITECTURES)
        chosen = cuda::cuda_launcher();
#endif
    } else if (py::isinstance<py::capsule>(which)) {
        chosen = static_cast<cuda::Launcher*>(PyCapsule_GetPointer(which.ptr(), "agr_cuda.Launcher"));
    } else if (py::cast<std::string>(which) == "nothing") {
        chosen = &rehearsal;
    } else {
        throw std::invalid_argument("a launcher is None, 'nothing' or a capsule");
    }
    current = {chosen, !which.is_none()};
}

DeviceType device_type() { return current.stands_in ? cpu_device : cuda_device; }

class CudaExecutor {
public:
    CudaExecutor(const Plan& plan, const py::list& tensors, int groups, int device, int blocks,
                 std::int64_t prefetched_bytes, std::uint32_t tactics)
        : device_(device), groups_(static_cast<std::size_t>(groups)) {
        Rows rows = rows_of(tensors, device_type(), device);
        if (rows.groups > groups_) throw std::invalid_argument("a tensor's group is not among the groups");
        rule_ = rows.rule;
        tensors_ = static_cast<std::int64_t>(rows.tensors.size());
        executor_ = std::make_unique<cuda::Executor>(plan, std::move(rows.tensors), groups, device, blocks,
                                                     prefetched_bytes, launcher(), tactics);
    }

    // How many steps were launched and uploads made: a test's proof of how few they are.
    std::tuple<std::int64_t, std::int64_t> launches() const { return {executor_->steps(), executor_->uploads()}; }

    // The table as it is to lie in the memory of a tensor, which is then attached.
    py::bytes table() const {
        const std::vector<unsigned char> bytes = executor_->table();
        return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    }
    void attach(const py::handle& tensor) { executor_->attach(reader().read_or_throw(tensor, "table").data()); }

    // Whether the stream's work is being captured. `phase`: "all", "reduce" or "update".
    bool launch(const GradientTable& gradients, const py::list& groups, bool counts, double max_grad_norm,
                double clip_eps, const py::object& clip, const py::object& squares, const py::object& grad_scale,
                const py::object& found_inf, const py::object& sums, const std::string& phase, std::uintptr_t stream,
                const py::sequence& counted) {
        std::vector<cuda::DeviceGroup> numbers;
        for (py::handle item : groups) {
            const GroupNumbers group = group_of(item, rule_);
            numbers.push_back({group.group, nullptr, Type::float32, nullptr, counts});
            if (group.lr != nullptr) {
                const TensorView lr = one(group.lr, "lr");
                numbers.back().lr = lr.data();
                numbers.back().lr_type = *lr.type();
            }
            if (group.steps != nullptr)
                numbers.back().count = static_cast<float*>(one(group.steps, "step", Type::float32).data());
        }
        const cuda::Settings settings{max_grad_norm,
                                      clip_eps,
                                      static_cast<const double*>(address(clip, "clip", Type::float64)),
                                      static_cast<double*>(address(squares, "squares", Type::float64)),
                                      static_cast<const float*>(address(grad_scale, "grad_scale", Type::float32)),
                                      static_cast<const float*>(address(found_inf, "found_inf", Type::float32)),
                                      static_cast<double*>(address(sums, "sums", Type::float64, 2 * tensors_))};
        const auto which = phase == "reduce"   ? cuda::Phase::reduce
                           : phase == "update" ? cuda::Phase::update
                                               : cuda::Phase::all;
        {
            py::gil_scoped_release unlocked;
            executor_->launch(gradients.addresses.data(), numbers, settings, which, reinterpret_cast<void*>(stream));
        }
        count_steps(counted);
        return executor_->captured();
    }

private:
    std::unique_ptr<cuda::Executor> executor_;
    int device_;
    std::size_t groups_;
    std::int64_t tensors_ = 0;
    Rule rule_ = Rule::adamw;

    TensorView one(py::handle tensor, const char* role, std::optional<Type> type = std::nullopt,
                   std::int64_t elements = 1) const {
        const TensorView view = on_device(tensor, role, device_type(), device_);
        if (view.elements() != elements || (type && view.type() != type))
            throw std::invalid_argument(std::string(role) + " has another type or size than the kernel reads");
        return view;
    }

    void* address(const py::object& tensor, const char* role, Type type, std::int64_t elements = 1) const {
        return tensor.is_none() ? nullptr : one(tensor, role, type, elements).data();
    }
};

// Whether a kernel is compiled for tensors of these types (see types_of).
bool cuda_compiled(const std::string& rule, const py::tuple& types) {
    return cuda::is_compiled({cuda::family_of(rule_named(rule)), types_of(types)});
}

// (chunk_elements, window_bytes, lead_bytes, prefetched bytes, blocks of a multiprocessor, multiprocessors) of a launch
// for tensors of these types.
std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, int, int> cuda_limits(const std::string& rule,
                                                                                         const py::tuple& of_tensors,
                                                                                         int device) {
    const Types types = types_of(of_tensors);
    const cuda::Kernel kernel{cuda::family_of(rule_named(rule)), types};
    const cuda::Launcher::Device properties = launcher().device(device);
    const int resident = launcher().resident_blocks(kernel, device);
    const Plan::Limits limits = cuda::default_limits(types, properties, resident, false);
    return {limits.chunk_elements,
            limits.window_bytes,
            limits.lead_bytes,
            cuda::default_prefetched_bytes(properties),
            resident,
            properties.multiprocessors};
}

}  // namespace

void bind_cuda(py::module_& m) {
#if defined(AGR_CUDA_ARCHITECTURES)
    m.attr("cuda_architectures") = AGR_CUDA_ARCHITECTURES;
#else
    m.attr("cuda_architectures") = "";
#endif
    m.attr("left_out") = AGR_LEFT_OUT;
    py::dict tactics;
    for (const auto& [name, tactic] : cuda::tactics) tactics[name] = static_cast<std::uint32_t>(tactic);
    m.attr("cuda_tactics") = tactics;
    use_launcher(py::none());
    m.def("use_launcher", &use_launcher, py::arg("which"));
    m.def("cuda_compiled", &cuda_compiled, py::arg("rule"), py::arg("types"));
    m.def("cuda_limits", &cuda_limits, py::arg("rule"), py::arg("types"), py::arg("device"));

    py::class_<CudaExecutor>(m, "CudaExecutor")
        .def(py::init<const Plan&, const py::list&, int, int, int, std::int64_t, std::uint32_t>())
        .def_property_readonly("launches", &CudaExecutor::launches)
        .def("table", &CudaExecutor::table)
        .def("attach", &CudaExecutor::attach, py::arg("tensor"))
        .def("launch", &CudaExecutor::launch);
}

}  // namespace agr::python
