// Reads in a few nanoseconds whether a tensor still is what it was, and where: off the words in which PyTorch keeps
// that.
//
// Asking PyTorch costs about 50 ns a tensor through any interface it has, and with five tensors a parameter that would
// be most of what a step costs the host. Where these words are is published nowhere and is not assumed here: it is
// found out, once in a process, on tensors made for it, from numbers that PyTorch does give out (Tensor._cdata,
// data_ptr(), DLPack's description), and then everything that is known to change a tensor in place is done to one, and
// must be seen. If anything is unlike what was expected, nothing is ever glanced at. A glance that finds a difference
// decides nothing either: the tensor is then read through PyTorch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tensor_reader.h"

namespace agr::python {

// What a tensor looked like. Only dense tensors of at most five dimensions, whose sizes are kept inside of them.
struct Look {
    bool taken = false;
    std::int32_t dimensions = 0;
    std::int64_t item_bytes = 0;
    PyTypeObject* class_ = nullptr;
    std::uint64_t kind = 0, keys = 0;  // type, device and flags; and whether it stands for its negative
    const void* owner = nullptr;       // how its storage is freed: copy-on-write is another owner
    struct {
        std::int64_t size, stride;
    } axes[5] = {};
};

class Glance {
public:
    // Finds out where the words are. Needs the GIL, and imports torch.
    explicit Glance(TensorReader& reader);

    bool works() const { return works_; }
    void use(bool wanted) { works_ = wanted && found_; }

    // The look of a tensor that was just read through PyTorch; not taken if it cannot be glanced at.
    Look look(PyObject* tensor, const TensorView& view) const;

    // Where the elements of a tensor are that looks like `look`; null if it looks otherwise. `tensor` may be any
    // object.
    void* find(PyObject* tensor, const Look& look) const {
        if (!look.taken || !works_ || Py_TYPE(tensor) != look.class_) return nullptr;
        const char* impl = word<const char*>(tensor, impl_at_);
        if (impl == nullptr) return nullptr;
        const char* storage = word<const char*>(impl, storage_at_);
        if (storage == nullptr || word<const void*>(storage, data_at_ + 8) != look.owner ||
            word<std::uint64_t>(impl, kind_at_) != look.kind || word<std::uint64_t>(impl, kind_at_ + 8) != look.keys ||
            word<std::int64_t>(impl, dimensions_at_) != look.dimensions)
            return nullptr;
        for (std::int32_t i = 0; i < look.dimensions; ++i) {
            const std::ptrdiff_t offset = 8 * i;
            if (word<std::int64_t>(impl, shape_at_ + offset) != look.axes[i].size ||
                word<std::int64_t>(impl, strides_at_ + offset) != look.axes[i].stride)
                return nullptr;
        }
        char* data = word<char*>(storage, data_at_);
        return data == nullptr ? nullptr : data + word<std::int64_t>(impl, offset_at_) * look.item_bytes;
    }

private:
    bool found_ = false, works_ = false;
    // Of the Python object; of the tensor that it refers to; and of that one's storage.
    std::ptrdiff_t impl_at_ = 0;
    std::ptrdiff_t storage_at_ = 0, dimensions_at_ = 0, shape_at_ = 0, strides_at_ = 0, offset_at_ = 0, kind_at_ = 0;
    std::ptrdiff_t data_at_ = 0;

    template <class T>
    static T word(const void* object, std::ptrdiff_t at) {
        T value;
        std::memcpy(&value, static_cast<const char*>(object) + at, sizeof(value));
        return value;
    }

    bool find_words(TensorReader& reader);
    bool sees_every_change(TensorReader& reader) const;
};

Glance& glance();

}  // namespace agr::python
