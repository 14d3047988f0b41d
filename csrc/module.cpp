// The Python module agr_cuda._C: plans, the watch over what a plan was made for, and the executors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/executor.h"
#include "plan.h"
#include "python/gradient_watch.h"
#include "python/rows.h"
#include "python/tensor_reader.h"
#include "python/watch.h"

namespace py = pybind11;

namespace agr::python {

void bind_cpu(py::module_& module);
void bind_cuda(py::module_& module);

namespace {

// `tensors`: (elements, bytes of a gradient's element, regularize) of each.
Plan make_plan(const std::vector<std::tuple<std::int64_t, std::int32_t, bool>>& tensors, bool clip,
               std::optional<std::int64_t> chunk_elements, std::optional<std::int64_t> window_bytes,
               std::optional<std::int64_t> lead_bytes, bool apart) {
    std::vector<Plan::Tensor> planned;
    for (const auto& [elements, gradient_bytes, regularize] : tensors)
        planned.push_back({elements, gradient_bytes, regularize});
    Plan::Limits limits = cpu::default_limits(clip);
    if (chunk_elements) limits.chunk_elements = *chunk_elements;
    if (window_bytes) limits.window_bytes = *window_bytes;
    if (lead_bytes) limits.lead_bytes = *lead_bytes;
    limits.apart = apart;
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
    m.def("uses_exchange_api", [] { return reader().uses_exchange_api(); });
    m.def("use_exchange_api", [](bool wanted) { reader().use_exchange_api(wanted); }, py::arg("wanted"));

    py::class_<Plan>(m, "Plan")
        .def(py::init(&make_plan), py::arg("tensors"), py::arg("clip") = false, py::arg("chunk_elements") = py::none(),
             py::arg("window_bytes") = py::none(), py::arg("lead_bytes") = py::none(), py::arg("apart") = false)
        .def_property_readonly("tasks", &tasks_of)
        .def_property_readonly("chunks", [](const Plan& plan) { return plan.chunks; })
        .def_property_readonly("chunk_elements", [](const Plan& plan) { return plan.limits.chunk_elements; })
        .def_property_readonly("window_bytes", [](const Plan& plan) { return plan.limits.window_bytes; })
        .def_property_readonly("lead_bytes", [](const Plan& plan) { return plan.limits.lead_bytes; })
        .def_property_readonly("first_update", [](const Plan& plan) { return plan.first_update; });

    py::class_<GradientTable, std::shared_ptr<GradientTable>>(m, "GradientTable")
        .def(py::init<>())
        // Their addresses, 8 bytes each.
        .def("__bytes__", [](const GradientTable& table) {
            return py::bytes(reinterpret_cast<const char*>(table.addresses.data()),
                             table.addresses.size() * sizeof(void*));
        });

    // For what is launched from Python; executors of ours do this themselves.
    m.def("count_steps", &count_steps, py::arg("groups"));

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
             py::arg("gradient_class"), py::arg("gradient_type"), py::arg("staged"), py::arg("inner"),
             py::arg("placements"))
        .def("add_by_reference", &Watch::add_by_reference, py::arg("index"))
        .def("unchanged", &Watch::unchanged, py::arg("groups"), py::arg("state"))
        .def_property_readonly("updated", &Watch::updated)
        .def("release", &Watch::release);

    py::class_<GradientWatch>(m, "GradientWatch")
        .def(py::init<std::size_t>(), py::arg("parameters"))
        .def("add", &GradientWatch::add, py::arg("index"), py::arg("table"), py::arg("slot"), py::arg("gradient"))
        .def("add_as_in", &GradientWatch::add_as_in, py::arg("other"), py::arg("index"), py::arg("table"),
             py::arg("slot"))
        .def("add_shared", &GradientWatch::add_shared, py::arg("index"), py::arg("first"))
        .def("add_by_reference", &GradientWatch::add_by_reference, py::arg("index"))
        .def("read", &GradientWatch::read, py::arg("parameters"));

    bind_cpu(m);
    bind_cuda(m);
}
