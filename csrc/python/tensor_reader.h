// Reads off a torch.Tensor where and what it is, without PyTorch's headers.
//
// PyTorch from 2.10 on hands out DLPack's C exchange interface (dlpack.h, DLPackExchangeAPI): a table of plain C
// functions, one of which describes a tensor in about 50 ns. Older releases are asked through the tensor's Python
// methods, which takes about ten times as long.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../step.h"

namespace agr::python {

// The type that PyTorch calls so ("torch.float32", ...). Throws std::invalid_argument for what no kernel takes.
Type type_named(const std::string& name);

// DLPack's numbering of devices.
enum DeviceType : std::int32_t { cpu_device = 1, cuda_device = 2, other_device = -1 };

// What a tensor is and where: DLPack's DLTensor, member by member, as of version 1.
struct TensorView {
    struct Kind {
        std::int32_t device_type, device_index;
        std::int32_t dimensions;
        std::uint8_t code, bits;  // of the type of its elements
        std::uint16_t lanes;

        bool operator==(const Kind& other) const { return std::memcmp(this, &other, sizeof(Kind)) == 0; }
    };

    void* memory;
    Kind kind;
    // Owned by the tensor, or by the reader until it reads the next one.
    const std::int64_t* shape;
    const std::int64_t* strides;
    std::uint64_t byte_offset;

    void* data() const { return static_cast<char*>(memory) + byte_offset; }
    std::optional<Type> type() const;  // none for a type that no kernel takes
    std::int64_t elements() const {
        std::int64_t product = 1;
        for (std::int32_t i = 0; i < kind.dimensions; ++i) product *= shape[i];
        return product;
    }
};
// Makes `kind` one of tensors of this type.
void set_type(TensorView::Kind& kind, Type type);
static_assert(sizeof(TensorView::Kind) == 16 && sizeof(TensorView) == 48, "as DLPack has it");

class TensorReader {
public:
    TensorReader();

    // False, with no Python exception set, for what is no tensor in the memory of a device (sparse, or a wrapper around
    // others).
    bool read(PyObject* tensor, TensorView& view) {
        const bool described = describe_ != nullptr ? describe_(tensor, &view) == 0 : read_by_methods(tensor, view);
        if (!described) PyErr_Clear();
        // Wrappers around other tensors, and tensors whose storage was taken away, have elements and no memory.
        return described && (view.memory != nullptr || view.elements() == 0);
    }

    // read(), or throws what `read` swallows as a RuntimeError that names `role`.
    TensorView read_or_throw(pybind11::handle tensor, const char* role);

    bool uses_exchange_api() const { return describe_ != nullptr; }
    void use_exchange_api(bool wanted);

private:
    int (*describe_)(void*, TensorView*) = nullptr;  // DLPackDLTensorFromPyObjectNoSync
    std::vector<std::int64_t> buffer_;

    bool read_by_methods(PyObject* tensor, TensorView& view);
};

// Whether a tensor is a view that stands for its negative, which no description tells.
bool is_negative_view(PyObject* tensor);

// The address of a tensor without elements may be null, which in a GradientTable stands for a missing gradient.
const void* not_null(const void* data);

// The one reader; made when it is first asked for, since that imports torch. Needs the GIL.
TensorReader& reader();

}  // namespace agr::python
