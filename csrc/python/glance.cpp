#include "glance.h"

#include <pybind11/eval.h>

#include <algorithm>
#include <exception>
#include <vector>

namespace py = pybind11;

namespace agr::python {
namespace {

const void* address_of(const py::object& tensor) {
    return reinterpret_cast<const void*>(py::cast<std::uintptr_t>(tensor.attr("_cdata")));
}

// A tensor of a storage of its own, by an expression in `torch`.
py::object made(const char* expression) {
    py::dict names;
    names["torch"] = py::module_::import("torch");
    return py::eval(expression, names);
}

// Where in objects of one kind a certain word is: wherever it was in all of them.
class Places {
public:
    void narrow(const void* object, std::ptrdiff_t from, std::ptrdiff_t to, const void* wanted) {
        std::vector<std::ptrdiff_t> here;
        for (std::ptrdiff_t at = from; at + 8 <= to; at += 8) {
            const void* value;
            std::memcpy(&value, static_cast<const char*>(object) + at, sizeof(value));
            const bool before = first_ || std::find(places_.begin(), places_.end(), at) != places_.end();
            if (value == wanted && before) here.push_back(at);
        }
        places_ = here;
        first_ = false;
    }
    bool one() const { return places_.size() == 1; }
    std::ptrdiff_t front() const { return places_.front(); }

private:
    std::vector<std::ptrdiff_t> places_;
    bool first_ = true;
};

}  // namespace

Glance::Glance(TensorReader& reader) {
    try {
        // Without DLPack's C interface, sizes are read into memory of the reader's own.
        found_ = reader.uses_exchange_api() && sizeof(void*) == 8 && find_words(reader) && sees_every_change(reader);
    } catch (const std::exception&) {
        found_ = false;  // PyTorch has become otherwise
    }
    works_ = found_;
}

bool Glance::find_words(TensorReader& reader) {
    // Of different types, dimensions, sizes and strides, in the middle of a storage.
    const char* expressions[] = {
        "torch.empty(40, dtype=torch.float32)[11:18]",
        "torch.empty(4, 90, dtype=torch.float64)[:, 13:30]",
        "torch.empty(700, dtype=torch.bfloat16).as_strided((3, 2, 5), (70, 30, 2), 17)",
        "torch.empty(900, dtype=torch.float16).as_strided((2, 3, 2, 3, 2), (400, 90, 40, 7, 3), 19)",
        "torch.frombuffer(bytearray(200), dtype=torch.float32)[5:9]",  // whose storage has an owner elsewhere
    };
    constexpr std::ptrdiff_t offsets[] = {11, 13, 17, 19, 5};
    constexpr int types = 4;
    std::vector<std::uint64_t> kinds;
    Places impl_places, storage_places, data_places, shape_places;
    for (int i = 0; i < 5; ++i) {
        py::object tensor = made(expressions[i]);
        TensorView view;
        if (!reader.read(tensor.ptr(), view) || !view.type) return false;
        const char* impl = static_cast<const char*>(address_of(tensor));
        py::object storage_object = tensor.attr("untyped_storage")();
        const void* storage = address_of(storage_object);
        const char* data = static_cast<const char*>(view.data) - offsets[i] * bytes_of(*view.type);

        const std::ptrdiff_t shape_at = reinterpret_cast<const char*>(view.shape) - impl;
        const std::ptrdiff_t strides_at = reinterpret_cast<const char*>(view.strides) - impl;
        // Sizes, then as many strides, inside of the object, behind what every object has in front.
        if (shape_at < 32 || shape_at > 256 || shape_at % 8 != 0 || strides_at != shape_at + 40) return false;
        impl_places.narrow(tensor.ptr(), sizeof(PyObject), Py_TYPE(tensor.ptr())->tp_basicsize, impl);
        storage_places.narrow(impl, 8, shape_at, storage);
        data_places.narrow(storage, 8, 48, data);
        shape_places.narrow(&shape_at, 0, 8, reinterpret_cast<const void*>(i == 0 ? shape_at : shape_at_));
        shape_at_ = shape_at;
        strides_at_ = strides_at;
        // Before the sizes, how many they are; after the strides the offset in the storage, the number of elements, and
        // then type and device.
        dimensions_at_ = shape_at - 8;
        offset_at_ = strides_at + 40;
        kind_at_ = offset_at_ + 16;
        if (word<std::int64_t>(impl, dimensions_at_) != view.dimensions) return false;
        if (word<std::int64_t>(impl, offset_at_) != offsets[i]) return false;
        if (word<std::int64_t>(impl, offset_at_ + 8) != view.elements()) return false;
        for (std::uint64_t other : kinds)
            if (i < types && word<std::uint64_t>(impl, kind_at_) == other) return false;
        kinds.push_back(word<std::uint64_t>(impl, kind_at_));
    }
    if (!impl_places.one() || !storage_places.one() || !data_places.one() || !shape_places.one()) return false;
    impl_at_ = impl_places.front();
    storage_at_ = storage_places.front();
    data_at_ = data_places.front();
    return true;
}

bool Glance::sees_every_change(TensorReader& reader) const {
    struct Change {
        const char* to;  // what the tensor `t`, of 12 elements of float32, becomes by it
        bool seen;
    };
    const Change changes[] = {
        {"t.add_(1)", false},
        {"t.requires_grad_()", false},
        {"setattr(t, 'data', torch.zeros(12))", true},
        {"setattr(t, 'data', torch.zeros(12, dtype=torch.float64))", true},
        {"setattr(t, 'data', t.data.view(torch.int32))", true},
        {"setattr(t, 'data', torch.zeros(13))", true},
        {"setattr(t, 'data', torch.zeros(3, 4))", true},
        {"setattr(t, 'data', torch.zeros(24)[::2])", true},
        {"t.set_(torch.zeros(12))", true},
        {"t.set_(torch.zeros(12).untyped_storage(), 0, (12,), (1,))", true},
        {"t.set_(t.untyped_storage(), 1, (11,), (1,))", true},
        {"t.set_()", true},
        {"t.as_strided_((12,), (0,))", true},
        {"t.as_strided_((6,), (2,))", true},
        {"t.as_strided_((5,), (1,), 3)", true},
        {"t.unsqueeze_(0)", true},
        {"t.unsqueeze_(1)", true},
        {"t.resize_(1000)", true},
        {"t.resize_(7)", true},
        {"t.untyped_storage().resize_(0)", true},
        {"t.untyped_storage().resize_(1 << 20)", true},
        {"torch.utils.swap_tensors(t, torch.zeros(12))", true},
        {"torch.utils.swap_tensors(t, torch._neg_view(t.data))", true},
        {"torch._lazy_clone(t)", true},  // shares the storage until either is written
    };
    py::dict names;
    names["torch"] = py::module_::import("torch");
    for (const Change& change : changes) {
        names["t"] = made("torch.zeros(12)");
        py::object tensor = names["t"];
        TensorView view;
        if (!reader.read(tensor.ptr(), view)) return false;
        Look before;
        {
            Glance trying = *this;
            trying.works_ = true;
            before = trying.look(tensor.ptr(), view);
            if (!before.taken) return false;
            py::eval(change.to, names);
            const bool same = trying.find(tensor.ptr(), before) == view.data;
            if (same == change.seen) return false;
        }
    }
    return true;
}

Look Glance::look(PyObject* tensor, const TensorView& view) const {
    Look look;
    if (!works_ || !view.type || view.dimensions > 5 || view.elements() == 0) return look;
    if (Py_TYPE(tensor)->tp_basicsize < impl_at_ + 8) return look;
    const char* impl = word<const char*>(tensor, impl_at_);
    if (reinterpret_cast<const char*>(view.shape) != impl + shape_at_) return look;
    look.dimensions = view.dimensions;
    look.item_bytes = bytes_of(*view.type);
    look.class_ = Py_TYPE(tensor);
    look.kind = word<std::uint64_t>(impl, kind_at_);
    look.keys = word<std::uint64_t>(impl, kind_at_ + 8);
    const char* storage = word<const char*>(impl, storage_at_);
    if (storage == nullptr) return look;
    look.owner = word<const void*>(storage, data_at_ + 8);
    for (std::int32_t i = 0; i < view.dimensions; ++i) look.axes[i] = {view.shape[i], view.strides[i]};
    look.taken = true;
    // What a glance finds must be what PyTorch says.
    look.taken = find(tensor, look) == view.data;
    return look;
}

Glance& glance() {
    static Glance* only = new Glance(reader());
    return *only;
}

}  // namespace agr::python
