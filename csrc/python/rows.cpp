#include "rows.h"

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace agr::python {

Rule rule_named(const std::string& name) {
    if (name == "adamw") return Rule::adamw;
    if (name == "adamw_amsgrad") return Rule::adamw_amsgrad;
    if (name == "adan") return Rule::adan;
    if (name == "regularize") return Rule::regularize;
    throw std::invalid_argument("no rule is called '" + name +
                                "'; there are adamw, adamw_amsgrad, adan and regularize");
}

TensorView on_device(py::handle tensor, const char* role, DeviceType type, std::int32_t index) {
    const TensorView view = reader().read_or_throw(tensor, role);
    if (view.kind.device_type != type || view.kind.device_index != index)
        throw std::runtime_error(std::string("the ") + role + " is not on " +
                                 (type == cpu_device ? "the CPU" : "cuda:" + std::to_string(index)));
    if (!view.type()) throw std::runtime_error(std::string("no kernel takes the type of the ") + role);
    return view;
}

Rows rows_of(const py::list& tensors, DeviceType type, std::int32_t index) {
    Rows rows;
    for (py::handle item : tensors) {
        const auto row = py::cast<py::tuple>(item);
        Tensor tensor{};
        tensor.rule = rule_named(py::cast<std::string>(row[0]));
        tensor.group = py::cast<std::int32_t>(row[1]);
        rows.groups = std::max(rows.groups, static_cast<std::size_t>(tensor.group) + 1);
        tensor.index = py::cast<std::int32_t>(row[2]);
        const TensorView parameter = on_device(row[3], "parameter", type, index);
        tensor.span.parameter = parameter.data();
        tensor.span.elements = parameter.elements();
        tensor.types.parameter = *parameter.type();
        tensor.types.gradient = type_named(py::cast<std::string>(row[4]));
        tensor.types.state = tensor.types.parameter;  // for a rule without state
        const auto states = py::cast<py::tuple>(row[5]);
        if (static_cast<int>(states.size()) != states_of(tensor.rule))
            throw std::invalid_argument("a rule was given the wrong number of state tensors");
        for (std::size_t k = 0; k < states.size(); ++k) {
            const TensorView state = on_device(states[k], "state", type, index);
            if (state.elements() != tensor.span.elements)
                throw std::invalid_argument("a state tensor has the wrong size");
            tensor.span.state[k] = state.data();
            tensor.types.state = *state.type();
        }
        if (!row[6].is_none()) {
            const TensorView step = on_device(row[6], "step", type, index);
            if (step.type() != Type::float32 || step.elements() != 1)
                throw std::invalid_argument("a step count is one float32");
            tensor.step = static_cast<float*>(step.data());
        }
        rows.rule = tensor.rule;
        rows.tensors.push_back(tensor);
    }
    return rows;
}

GroupNumbers group_of(py::handle item, Rule rule) {
    const auto tuple = py::cast<py::tuple>(item);
    const std::size_t size = rule == Rule::adan ? 9 : rule == Rule::regularize ? 1 : 6;
    if (tuple.size() != size) throw std::invalid_argument("a group has " + std::to_string(size) + " numbers");
    GroupNumbers numbers;
    double x[9] = {};
    for (std::size_t i = 0; i < size; ++i) {
        PyObject* value = PyTuple_GET_ITEM(tuple.ptr(), i);
        if (!PyFloat_Check(value) && !PyLong_Check(value) && rule != Rule::regularize && (i == 0 || i == 8)) {
            (i == 0 ? numbers.lr : numbers.steps) = value;
            continue;
        }
        x[i] = PyFloat_AsDouble(value);
        if (x[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    if (rule == Rule::regularize)
        numbers.group = {{}, {}, 0, x[0]};
    else if (rule == Rule::adan)
        numbers.group = {{}, {x[0], x[1], x[2], x[3], x[4], x[5], x[6]}, x[8] + 1, x[7]};
    else
        numbers.group = {{x[0], x[1], x[2], x[3], x[4]}, {}, 0, x[5]};
    return numbers;
}

void count_steps(const py::sequence& groups) {
    static PyObject* const step = PyUnicode_InternFromString("step");
    for (py::handle group : groups) {
        py::dict dictionary = py::cast<py::dict>(group);
        dictionary[py::handle(step)] = py::int_(py::cast<std::int64_t>(dictionary[py::handle(step)]) + 1);
    }
}

}  // namespace agr::python
