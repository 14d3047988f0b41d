// Converts what Python passes to executors: rows of tensors, and the numbers of groups.
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

// `types`: the names of the types of parameter, gradient and state ("torch.float32", ...; "torch.uint8" stands for
// codes), whether there is a master, and whether rounding is stochastic.
Types types_of(const pybind11::tuple& types);

struct Rows {
    std::vector<Tensor> tensors;
    std::size_t groups = 0;   // that tensors refer to
    Rule rule = Rule::adamw;  // with or without AMSGrad where it is AdamW's: its groups have the same numbers
};

// The rule that Python calls so ("adamw", ...). Throws std::invalid_argument for any other name.
Rule rule_named(const std::string& name);

// `tensors`: (rule, group, index, types, parameter, states, scales of states, master or None, step or None) of each,
// where types are those of types_of. Python keeps them alive, and the Watch notices when they move. Of "regularize" the
// parameter's address is not used: it is the gradient that is changed.
Rows rows_of(const pybind11::list& tensors, DeviceType type, std::int32_t index = 0);

// `groups`: for AdamW (lr, beta1, beta2, eps, weight_decay, sign, seed), for Adan (lr, beta1, beta2, beta3, eps,
// weight_decay, no_prox, sign, steps made, seed), for "regularize" (sign). Where a tensor stands for lr or the steps,
// its place is given back instead of a number.
struct GroupNumbers {
    Group group{};
    PyObject* lr = nullptr;
    PyObject* steps = nullptr;
};
GroupNumbers group_of(pybind11::handle tuple, Rule rule);

// Raises "step" of each of these dictionaries, which are Adan's groups whose step count is a number. The native call
// that makes a step does this too, since no signal handler can come between the two there.
void count_steps(const pybind11::sequence& groups);

}  // namespace agr::python
