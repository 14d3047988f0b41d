// The parts of the Python module agr_cuda._C.
#pragma once

#include <pybind11/pybind11.h>

namespace agr::python {

void bind_cpu(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);

}  // namespace agr::python
