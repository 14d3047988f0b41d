// Reads off a torch.Tensor where and what it is, without PyTorch's headers.
//
// PyTorch from 2.10 on hands out DLPack's C exchange interface (dlpack.h, DLPackExchangeAPI): a table of plain C
// functions, one of which describes a tensor in about ten nanoseconds. Older releases are asked through the tensor's
// Python methods, which takes about half a microsecond.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../step.h"

namespace agr::python {

// The type that PyTorch calls so ("torch.float32", ...). Throws std::invalid_argument for what no kernel takes.
Type type_named(const std::string& name);

// DLPack's numbering of devices.
enum DeviceType : std::int32_t { cpu_device = 1, cuda_device = 2, other_device = -1 };

struct TensorView {
    void* data;
    std::int32_t device_type;
    std::int32_t device_index;
    std::optional<Type> type;  // none for a type that no kernel takes
    std::int32_t dimensions;
    // Owned by the tensor, or by the reader until it reads the next one.
    const std::int64_t* shape;
    const std::int64_t* strides;

    std::int64_t elements() const;
};

struct DLTensor;

class TensorReader {
public:
    TensorReader();

    // False, with no Python exception set, for what is no tensor in the memory of a device (sparse, or a wrapper around
    // others).
    bool read(PyObject* tensor, TensorView& view);

    // read(), or throws what `read` swallows as a RuntimeError that names `role`.
    TensorView read_or_throw(pybind11::handle tensor, const char* role);

    bool uses_exchange_api() const { return describe_ != nullptr; }
    void use_exchange_api(bool wanted);

private:
    int (*describe_)(void*, DLTensor*) = nullptr;  // DLPackDLTensorFromPyObjectNoSync
    std::vector<std::int64_t> buffer_;

    bool read_through_api(PyObject* tensor, TensorView& view) const;
    bool read_through_methods(PyObject* tensor, TensorView& view);
};

// The one reader; made when it is first asked for, since that imports torch. Needs the GIL.
TensorReader& reader();

}  // namespace agr::python
