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

// Whether something was found; it was not if PyTorch has become otherwise.
template <class Find>
bool succeeds(const Find& find) {
    try {
        return find();
    } catch (const std::exception&) {
        return false;
    }
}

// Modes of PyTorch in which tensors made for an experiment are as they are without any.
class OrdinaryModes {
public:
    OrdinaryModes() : stack_(py::module_::import("contextlib").attr("ExitStack")()) {
        const py::module_ torch = py::module_::import("torch");
        for (const py::object& mode : {torch.attr("inference_mode")(false), torch.attr("enable_grad")(),
                                       torch.attr("device")("cpu").cast<py::object>()})
            stack_.attr("enter_context")(mode);
    }
    ~OrdinaryModes() {
        try {
            stack_.attr("close")();
        } catch (const std::exception&) {
            // Of leaving a mode nothing comes that anybody could be told here.
        }
    }
    OrdinaryModes(const OrdinaryModes&) = delete;
    OrdinaryModes& operator=(const OrdinaryModes&) = delete;

private:
    py::object stack_;
};

}  // namespace

Glance::Glance(TensorReader& reader) {
    found_ = succeeds([&] {
        const OrdinaryModes modes;
        // Without DLPack's C interface, sizes are read into memory of the reader's own.
        if (!reader.uses_exchange_api() || sizeof(void*) != 8 || !find_words(reader) || !sees_every_change(reader))
            return false;
        finds_gradients_ = succeeds([&] { return find_gradients(); });
        counts_changes_ = succeeds([&] { return find_change_count(); });
        return true;
    });
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
    std::vector<std::int64_t> kinds;
    std::ptrdiff_t shape_seen = 0;
    Places impl_places, storage_places, data_places;
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
        if (i > 0 && shape_at != shape_seen) return false;
        shape_seen = shape_at;
        // Before the sizes, how many they are; after the strides the offset in the storage, the number of elements, and
        // then type and device.
        image_at_ = shape_at - 8;
        if (of_image(impl, Image::dimensions) != view.dimensions) return false;
        if (of_image(impl, Image::offset) != offsets[i]) return false;
        if (of_image(impl, Image::elements) != view.elements()) return false;
        for (std::int64_t other : kinds)
            if (i < types && of_image(impl, Image::kind) == other) return false;
        kinds.push_back(of_image(impl, Image::kind));
    }
    if (!impl_places.one() || !storage_places.one() || !data_places.one()) return false;
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
        Images images;
        Look before;
        {
            Glance trying = *this;
            trying.works_ = true;
            before = trying.look(tensor.ptr(), view, images);
            if (before.image == nullptr) return false;
            py::eval(change.to, names);
            const bool found = trying.find(tensor.ptr(), before) == view.data;
            if (found == change.seen || trying.same(tensor.ptr(), before) == change.seen) return false;
        }
    }
    return true;
}

// On tensors that get a gradient, lose it, and get another: by assignment and from a backward pass.
bool Glance::find_gradients() {
    py::dict names;
    names["torch"] = py::module_::import("torch");
    std::vector<py::object> tensors;
    Places meta_places, gradient_places;
    for (int i = 0; i < 4; ++i) {
        py::object t = made("torch.zeros(5)");
        tensors.push_back(t);
        const char* impl = static_cast<const char*>(address_of(t));
        std::vector<const void*> before;
        for (std::ptrdiff_t at = 0; at < image_at_; at += 8) before.push_back(word<const void*>(impl, at));
        t.attr("requires_grad_")();
        // Nothing is kept for autograd before, and something after.
        const void* meta = nullptr;
        for (std::ptrdiff_t at = 8; at < image_at_; at += 8) {
            const void* now = word<const void*>(impl, at);
            if (now == before[static_cast<std::size_t>(at) / 8]) continue;
            if (before[static_cast<std::size_t>(at) / 8] != nullptr || meta != nullptr) return false;
            meta = now;
        }
        if (meta == nullptr) return false;
        meta_places.narrow(impl, 8, image_at_, meta);
        t.attr("grad") = made("torch.ones(5)");
        gradient_places.narrow(meta, 8, 72, address_of(t.attr("grad")));
    }
    if (!meta_places.one() || !gradient_places.one()) return false;
    meta_at_ = meta_places.front();
    gradient_at_ = gradient_places.front();

    for (py::object& t : tensors) {
        auto gradient = [&] { return impl_of(gradient_of(t.ptr())); };
        t.attr("grad") = py::none();
        if (no_tensor_ == nullptr) no_tensor_ = gradient();
        if (gradient() != no_tensor_) return false;
        names["t"] = t;
        py::eval("(3 * t).sum().backward()", names);
        if (gradient() != address_of(t.attr("grad")) || gradient() == no_tensor_) return false;
        t.attr("grad") = made("torch.ones(5)");
        if (gradient() != address_of(t.attr("grad"))) return false;
        py::eval("torch.utils.swap_tensors(t, torch.zeros(5))", names);
        if (!undefined(gradient_of(t.ptr()))) return false;
    }
    return true;
}

// A tensor and what is detached of it share their count, and nothing else but the storage; the count is the number that
// PyTorch gives out as `_version`.
bool Glance::find_change_count() {
    std::vector<py::object> tensors;
    Places counter_places;
    std::vector<const void*> seen;
    for (int i = 0; i < 4; ++i) {
        tensors.push_back(made("torch.zeros(5)"));
        const py::object other = tensors.back().attr("detach")();
        const char* impl = static_cast<const char*>(address_of(tensors.back()));
        const char* shared_with = static_cast<const char*>(address_of(other));
        const void* counter = nullptr;
        for (std::ptrdiff_t at = 8; at < image_at_; at += 8) {
            const void* value = word<const void*>(impl, at);
            if (at == storage_at_ || value == nullptr || value != word<const void*>(shared_with, at)) continue;
            // Not what all tensors have in common, such as how often they are referred to.
            const void* elsewhere = word<const void*>(static_cast<const char*>(address_of(made("torch.zeros(5)"))), at);
            if (value == elsewhere) continue;
            if (counter != nullptr) return false;
            counter = value;
        }
        if (counter == nullptr || std::find(seen.begin(), seen.end(), counter) != seen.end()) return false;
        seen.push_back(counter);
        counter_places.narrow(impl, 8, image_at_, counter);
    }
    if (!counter_places.one()) return false;
    counter_at_ = counter_places.front();

    // Behind what every counted object has in front, in the first 32 bytes.
    std::vector<std::ptrdiff_t> places;
    for (std::ptrdiff_t at = 8; at + 4 <= 32; at += 4) {
        bool everywhere = true;
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            for (std::size_t changes = 0; changes < 3 * i + 2; ++changes) tensors[i].attr("add_")(1);
            const auto version = py::cast<std::uint32_t>(tensors[i].attr("_version"));
            everywhere = everywhere && word<std::uint32_t>(seen[i], at) == version;
        }
        if (everywhere) places.push_back(at);
    }
    if (places.size() != 1) return false;
    count_at_ = places.front();
    for (const py::object& tensor : tensors) {
        const auto before = py::cast<std::uint32_t>(tensor.attr("_version"));
        count_change(tensor.ptr());
        if (py::cast<std::uint32_t>(tensor.attr("_version")) != before + 1) return false;
    }
    return true;
}

Look Glance::look(PyObject* tensor, const TensorView& view, Images& images) const {
    if (!works_ || !view.type || view.dimensions > 5 || view.elements() == 0) return {};
    if (Py_TYPE(tensor)->tp_basicsize < impl_at_ + 8) return {};
    Look look;
    look.impl = word<const char*>(tensor, impl_at_);
    if (reinterpret_cast<const char*>(view.shape) != look.impl + image_at_ + 8 * Image::size) return {};
    look.class_ = Py_TYPE(tensor);
    look.storage = word<const char*>(look.impl, storage_at_);
    if (look.storage == nullptr) return {};
    look.data = word<const void*>(look.storage, data_at_);
    look.owner = word<const void*>(look.storage, data_at_ + 8);
    Image image;
    std::memcpy(image.word, look.impl + image_at_, sizeof(image.word));
    for (int i = view.dimensions; i < 5; ++i) image.word[Image::size + i] = image.word[Image::stride + i] = 0;
    image.item_bytes = bytes_of(*view.type);
    look.image = &*images.insert(image).first;
    // What a glance finds must be what PyTorch says.
    if (find(tensor, look) != view.data) return {};
    return look;
}

Glance& glance() {
    static Glance* only = new Glance(reader());
    return *only;
}

}  // namespace agr::python
