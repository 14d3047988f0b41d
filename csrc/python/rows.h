// What executors are told from Python: rows of tensors, and the numbers of groups.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../step.h"
#include "tensor_reader.h"

namespace agr::python {

// A tensor where an executor expects it, or a RuntimeError that names `role`.
TensorView on_device(pybind11::handle tensor, const char* role, DeviceType type, std::int32_t index = 0);

struct Rows {
    std::vector<Tensor> tensors;
    std::size_t groups = 0;  // that tensors refer to
    bool adan = false;
};

// `tensors`: (rule, group, parameter, gradient, states, step or None, fresh) of each. Python keeps them alive, and the
// Watch notices when they move.
Rows rows_of(const pybind11::list& tensors, DeviceType type, std::int32_t index = 0);

// `groups`: for AdamW (lr, beta1, beta2, eps, weight_decay, sign), for Adan (lr, beta1, beta2, beta3, eps,
// weight_decay, no_prox, sign, steps made). Where a tensor stands for lr or the steps, its place is given back instead
// of a number.
struct GroupNumbers {
    Group group{};
    PyObject* lr = nullptr;
    PyObject* steps = nullptr;
};
GroupNumbers group_of(pybind11::handle tuple, bool adan);

// What a step leaves in Python's objects, where no signal handler can come between the step and these notes of it.
struct Notes {
    const pybind11::list& counted;  // the dictionaries of Adan's groups whose "step" is a number
    const pybind11::set& fresh;     // from which `stepped` is taken
    const pybind11::list& stepped;

    void write() const;
};

}  // namespace agr::python
