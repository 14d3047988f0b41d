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

Types types_of(const py::tuple& types) {
    auto named = [&](std::size_t i) { return type_named(py::cast<std::string>(types[i])); };
    return {named(0), named(1), named(2), py::cast<bool>(types[3]), py::cast<bool>(types[4])};
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
        tensor.types = types_of(py::cast<py::tuple>(row[3]));
        const TensorView parameter = on_device(row[4], "parameter", type, index);
        if (parameter.type() != tensor.types.parameter) throw std::invalid_argument("a parameter has another type");
        tensor.span.parameter = parameter.data();
        tensor.span.elements = parameter.elements();
        // A tensor of this type and size.
        auto data_of = [&](py::handle given, const char* role, Type wanted, std::int64_t elements) {
            const TensorView view = on_device(given, role, type, index);
            if (view.type() != wanted) throw std::invalid_argument(std::string("a ") + role + " has the wrong type");
            if (view.elements() != elements)
                throw std::invalid_argument(std::string("a ") + role + " has the wrong size");
            return view.data();
        };
        const std::int64_t elements = tensor.span.elements;
        const auto states = py::cast<py::tuple>(row[5]);
        const auto scales = py::cast<py::tuple>(row[6]);
        if (static_cast<int>(states.size()) != states_of(tensor.rule) ||
            scales.size() != (tensor.types.state == Type::code8 ? states.size() : 0))
            throw std::invalid_argument("a rule was given the wrong number of state tensors");
        for (std::size_t k = 0; k < states.size(); ++k)
            tensor.span.state[k] = data_of(states[k], "state", tensor.types.state, elements);
        for (std::size_t k = 0; k < scales.size(); ++k)
            tensor.span.scales[k] = static_cast<float*>(
                data_of(scales[k], "scale", Type::float32, (elements + scale_block - 1) / scale_block));
        if (row[7].is_none() == tensor.types.master)
            throw std::invalid_argument("a master is missing, or not asked for");
        if (tensor.types.master)
            tensor.span.master = static_cast<float*>(data_of(row[7], "master", Type::float32, elements));
        if (!row[8].is_none()) tensor.step = static_cast<float*>(data_of(row[8], "step", Type::float32, 1));
        rows.rule = tensor.rule;
        rows.tensors.push_back(tensor);
    }
    return rows;
}

GroupNumbers group_of(py::handle item, Rule rule) {
    const auto tuple = py::cast<py::tuple>(item);
    const std::size_t size = rule == Rule::adan ? 10 : rule == Rule::regularize ? 1 : 7;
    if (tuple.size() != size) throw std::invalid_argument("a group has " + std::to_string(size) + " numbers");
    GroupNumbers numbers;
    double x[10] = {};
    for (std::size_t i = 0; i < size; ++i) {
        PyObject* value = PyTuple_GET_ITEM(tuple.ptr(), i);
        if (!PyFloat_Check(value) && !PyLong_Check(value) && rule != Rule::regularize && (i == 0 || i == 8)) {
            (i == 0 ? numbers.lr : numbers.steps) = value;
            continue;
        }
        x[i] = PyFloat_AsDouble(value);
        if (x[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    const auto seed = static_cast<std::uint64_t>(x[size - 1]);
    if (rule == Rule::regularize)
        numbers.group = {{}, {}, 0, x[0], 0};
    else if (rule == Rule::adan)
        numbers.group = {{}, {x[0], x[1], x[2], x[3], x[4], x[5], x[6]}, x[8] + 1, x[7], seed};
    else
        numbers.group = {{x[0], x[1], x[2], x[3], x[4]}, {}, 0, x[5], seed};
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
