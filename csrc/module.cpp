// The Python module agr_cuda._C: plans, the watch over what a plan was made for, and the CPU executor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/executor.h"
#include "plan.h"
#include "python/tensor_reader.h"
#include "python/watch.h"

namespace py = pybind11;

namespace agr::python {
namespace {

Rule rule_named(const std::string& name) {
    if (name == "adamw") return Rule::adamw;
    if (name == "adamw_amsgrad") return Rule::adamw_amsgrad;
    if (name == "adan") return Rule::adan;
    throw std::invalid_argument("no rule is called '" + name + "'; there are adamw, adamw_amsgrad and adan");
}

// `tensors`: (elements, bytes of a gradient's element, regularize) of each.
Plan make_plan(const std::vector<std::tuple<std::int64_t, std::int32_t, bool>>& tensors, bool clip,
               std::optional<std::int64_t> chunk_elements, std::optional<std::int64_t> window_bytes,
               std::optional<std::int64_t> lead_bytes) {
    std::vector<Plan::Tensor> planned;
    for (const auto& [elements, gradient_bytes, regularize] : tensors)
        planned.push_back({elements, gradient_bytes, regularize});
    Plan::Limits limits = cpu::default_limits(clip);
    if (chunk_elements) limits.chunk_elements = *chunk_elements;
    if (window_bytes) limits.window_bytes = *window_bytes;
    if (lead_bytes) limits.lead_bytes = *lead_bytes;
    return Plan(std::move(planned), limits);
}

// (kind, tensor, chunk) of every task, in the order of the tickets.
py::list tasks_of(const Plan& plan) {
    py::list tasks;
    for (const Task& task : plan.tasks) {
        const char* kind = task.kind == TaskKind::reduce   ? "reduce"
                           : task.kind == TaskKind::update ? "update"
                                                           : "whole";
        tasks.append(py::make_tuple(kind, task.tensor, task.chunk));
    }
    return tasks;
}

TensorView on_cpu(py::handle tensor, const char* role) {
    const TensorView view = reader().read_or_throw(tensor, role);
    if (view.device_type != cpu_device) throw std::runtime_error(std::string("the ") + role + " is not on the CPU");
    if (!view.type) throw std::runtime_error(std::string("no kernel takes the type of the ") + role);
    return view;
}

class CpuExecutor {
public:
    // `tensors`: (rule, group, parameter, gradient, states, step or None, fresh) of each. Python keeps them alive, and
    // the Watch notices when they move.
    CpuExecutor(const Plan& plan, const py::list& tensors) {
        std::vector<Tensor> rows;
        for (py::handle item : tensors) {
            const auto row = py::cast<py::tuple>(item);
            Tensor tensor{};
            tensor.rule = rule_named(py::cast<std::string>(row[0]));
            tensor.group = py::cast<std::int32_t>(row[1]);
            groups_ = std::max(groups_, static_cast<std::size_t>(tensor.group) + 1);
            const TensorView parameter = on_cpu(row[2], "parameter");
            tensor.span.parameter = parameter.data;
            tensor.span.elements = parameter.elements();
            tensor.types.parameter = *parameter.type;
            tensor.types.gradient = *on_cpu(row[3], "gradient").type;
            const auto states = py::cast<py::tuple>(row[4]);
            if (static_cast<int>(states.size()) != states_of(tensor.rule))
                throw std::invalid_argument("a rule was given the wrong number of state tensors");
            for (std::size_t k = 0; k < states.size(); ++k) {
                const TensorView state = on_cpu(states[k], "state");
                if (state.elements() != tensor.span.elements)
                    throw std::invalid_argument("a state tensor has the wrong size");
                tensor.span.state[k] = state.data;
                tensor.types.state = *state.type;
            }
            if (!row[5].is_none()) {
                const TensorView step = on_cpu(row[5], "step");
                if (step.type != Type::float32 || step.elements() != 1)
                    throw std::invalid_argument("a step count is one float32");
                tensor.step = static_cast<float*>(step.data);
            }
            tensor.fresh = py::cast<bool>(row[6]);
            adan_ = tensor.rule == Rule::adan;
            rows.push_back(tensor);
        }
        executor_ = std::make_unique<cpu::Executor>(plan, std::move(rows));
    }

    double reduce(const GradientTable& gradients, int threads) {
        py::gil_scoped_release unlocked;
        return executor_->reduce(gradients.addresses.data(), threads);
    }

    // `groups`: for AdamW (lr, beta1, beta2, eps, weight_decay, sign), for Adan (lr, beta1, beta2, beta3, eps,
    // weight_decay, no_prox, sign, t). `counted`: the dictionaries of Adan's groups, whose "step" becomes t; `fresh`: a
    // set, from which `stepped` is taken. Here, where no signal handler can come between the update and these notes of
    // it.
    void update(const GradientTable& gradients, const py::list& groups, double clip, int threads,
                const py::list& counted, const py::set& fresh, const py::list& stepped) {
        if (groups.size() < groups_) throw std::invalid_argument("numbers are missing for some groups");
        std::vector<Group> numbers;
        numbers.reserve(groups.size());
        for (py::handle item : groups) numbers.push_back(group_of(item));
        {
            py::gil_scoped_release unlocked;
            executor_->update(gradients.addresses.data(), numbers, clip, threads);
        }
        for (std::size_t i = 0; i < counted.size(); ++i)
            py::cast<py::dict>(counted[i])["step"] = py::int_(static_cast<std::int64_t>(numbers.at(i).t));
        for (py::handle parameter : stepped) PySet_Discard(fresh.ptr(), parameter.ptr());
    }

private:
    std::unique_ptr<cpu::Executor> executor_;
    std::size_t groups_ = 0;  // that tensors refer to
    bool adan_ = false;

    Group group_of(py::handle item) const {
        const auto tuple = py::cast<py::tuple>(item);
        const std::size_t size = adan_ ? 9 : 6;
        if (tuple.size() != size) throw std::invalid_argument("a group has " + std::to_string(size) + " numbers");
        double x[9];
        for (std::size_t i = 0; i < size; ++i) {
            x[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple.ptr(), i));
            if (x[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
        }
        if (adan_) return {{}, {x[0], x[1], x[2], x[3], x[4], x[5], x[6]}, x[8], x[7]};
        return {{x[0], x[1], x[2], x[3], x[4]}, {}, 0, x[5]};
    }
};

// psi of each gradient, in place. Each is dense: its elements fill the memory that they lie in.
void regularize(const py::list& gradients, int threads) {
    std::vector<Tensor> tensors;
    std::vector<Plan::Tensor> planned;
    std::vector<const void*> addresses;
    for (py::handle item : gradients) {
        const TensorView gradient = on_cpu(item, "gradient");
        Tensor tensor{};
        tensor.rule = Rule::regularize;
        tensor.types = {*gradient.type, *gradient.type, *gradient.type};
        tensor.span.parameter = gradient.data;
        tensor.span.elements = gradient.elements();
        tensors.push_back(tensor);
        planned.push_back({tensor.span.elements, bytes_of(*gradient.type), true});
        addresses.push_back(gradient.data);
    }
    py::gil_scoped_release unlocked;
    cpu::Executor executor(Plan(std::move(planned), cpu::default_limits(false)), std::move(tensors));
    executor.update(addresses.data(), {{{}, {}, 0, 1}}, 1, threads);
}

// The garbage collector may look at an object before its constructor has run.
Watch* constructed_watch(PyObject* self) {
    auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
    return holder.holder_constructed() ? holder.value_ptr<Watch>() : nullptr;
}

}  // namespace
}  // namespace agr::python

PYBIND11_MODULE(_C, m) {
    using namespace agr;
    using namespace agr::python;

    m.doc() = "The native core of agr_cuda; see csrc/.";
    m.attr("left_out") = AGR_LEFT_OUT;
    m.def("instruction_set", [] { return std::string(cpu::instruction_set().name); });
    m.def("uses_exchange_api", [] { return reader().uses_exchange_api(); });
    m.def("use_exchange_api", [](bool wanted) { reader().use_exchange_api(wanted); }, py::arg("wanted"));
    m.def("regularize", &regularize, py::arg("gradients"), py::arg("threads"));

    py::class_<Plan>(m, "Plan")
        .def(py::init(&make_plan), py::arg("tensors"), py::arg("clip") = false, py::arg("chunk_elements") = py::none(),
             py::arg("window_bytes") = py::none(), py::arg("lead_bytes") = py::none())
        .def_property_readonly("tasks", &tasks_of)
        .def_property_readonly("chunks", [](const Plan& plan) { return plan.chunks; })
        .def_property_readonly("chunk_elements", [](const Plan& plan) { return plan.limits.chunk_elements; })
        .def_property_readonly("window_bytes", [](const Plan& plan) { return plan.limits.window_bytes; })
        .def_property_readonly("lead_bytes", [](const Plan& plan) { return plan.limits.lead_bytes; })
        .def_property_readonly("first_update", [](const Plan& plan) { return plan.first_update; });

    py::class_<GradientTable, std::shared_ptr<GradientTable>>(m, "GradientTable").def(py::init<>());

    py::class_<Watch>(m, "Watch", py::custom_type_setup([](PyHeapTypeObject* heap_type) {
                          PyTypeObject* type = &heap_type->ht_type;
                          type->tp_flags |= Py_TPFLAGS_HAVE_GC;
                          type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
                              Py_VISIT(Py_TYPE(self));
                              Watch* watch = constructed_watch(self);
                              return watch != nullptr ? watch->traverse(visit, arg) : 0;
                          };
                          type->tp_clear = [](PyObject* self) {
                              if (Watch* watch = constructed_watch(self)) watch->clear();
                              return 0;
                          };
                      }))
        .def(py::init<py::list, py::dict>(), py::arg("groups"), py::arg("state"))
        .def("add", &Watch::add, py::arg("index"), py::arg("keys"), py::arg("table"), py::arg("slot"),
             py::arg("relaid"))
        .def("add_untabled", &Watch::add_untabled, py::arg("index"))
        .def("unchanged", &Watch::unchanged, py::arg("groups"), py::arg("state"))
        .def("release", &Watch::release);

    py::class_<CpuExecutor>(m, "CpuExecutor")
        .def(py::init<const Plan&, const py::list&>(), py::arg("plan"), py::arg("tensors"))
        .def("reduce", &CpuExecutor::reduce, py::arg("gradients"), py::arg("threads"))
        .def("update", &CpuExecutor::update, py::arg("gradients"), py::arg("groups"), py::arg("clip"),
             py::arg("threads"), py::arg("counted"), py::arg("fresh"), py::arg("stepped"));
}
