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
#include <set>

#include "tensor_reader.h"

namespace agr::python {

// Sizes and kind of a tensor, in the words in which PyTorch keeps them: the number of dimensions, at most five sizes
// and strides, of which those of dimensions that there are not are 0 here, the offset in the storage, the number of
// elements, type and device and flags, and whether it stands for its negative.
struct Image {
    enum Word { dimensions = 0, size = 1, stride = 6, offset = 11, elements = 12, kind = 13, keys = 14, words = 15 };
    std::int64_t word[words];
    std::int64_t item_bytes;

    bool operator<(const Image& other) const { return std::memcmp(this, &other, sizeof(*this)) < 0; }
};

// Each once: a model's tensors have few shapes, and all that a step compares them with stays in the nearest cache.
using Images = std::set<Image>;

// What a tensor looked like, and where the words are that said so. Only dense tensors whose sizes are kept inside of
// them.
struct Look {
    const Image* image = nullptr;  // null for a tensor that cannot be glanced at
    PyTypeObject* class_ = nullptr;
    const char* impl = nullptr;
    const char* storage = nullptr;
    const void* data = nullptr;   // where the storage begins
    const void* owner = nullptr;  // how the storage is freed: copy-on-write is another owner
};

class Glance {
public:
    // Finds out where the words are. Needs the GIL, and imports torch.
    explicit Glance(TensorReader& reader);

    bool works() const { return works_; }
    void use(bool wanted) { works_ = wanted && found_; }

    // The look of a tensor that was just read through PyTorch. Its image is put among `images`, which have to last.
    Look look(PyObject* tensor, const TensorView& view, Images& images) const;

    // Whether a tensor is just what it was, and where it was.
    //
    // What this follows is what the pointers were, not what they are: no load waits for another, so that a processor
    // has many of them under way. It is safe because each pointer has been found to be what it was before it is
    // followed.
    bool same(PyObject* tensor, const Look& look) const {
        return look.image != nullptr && works_ && Py_TYPE(tensor) == look.class_ &&
               word<const char*>(tensor, impl_at_) == look.impl &&
               word<const char*>(look.impl, storage_at_) == look.storage && fits(look.impl, *look.image) &&
               of_image(look.impl, Image::offset) == look.image->word[Image::offset] &&
               word<const void*>(look.storage, data_at_) == look.data &&
               word<const void*>(look.storage, data_at_ + 8) == look.owner;
    }

    // Where the elements of a tensor are that looks like `look`, wherever that is; null if it looks otherwise. `tensor`
    // may be any object.
    void* find(PyObject* tensor, const Look& look) const {
        if (look.image == nullptr || Py_TYPE(tensor) != look.class_) return nullptr;
        return find_impl(word<const char*>(tensor, impl_at_), look);
    }

    // The same of PyTorch's own object, which the Python object refers to.
    void* find_impl(const char* impl, const Look& look) const {
        if (look.image == nullptr || !works_ || impl == nullptr) return nullptr;
        const char* storage = word<const char*>(impl, storage_at_);
        if (storage == nullptr || word<const void*>(storage, data_at_ + 8) != look.owner || !fits(impl, *look.image))
            return nullptr;
        char* data = word<char*>(storage, data_at_);
        return data == nullptr ? nullptr : data + of_image(impl, Image::offset) * look.image->item_bytes;
    }

    // Gradients, without making PyTorch wrap each of them in a Python object: where a tensor keeps its own, as
    // PyTorch's handle of it (an at::Tensor), of which `impl_of` is the object. Null where autograd has kept nothing so
    // far.
    bool finds_gradients() const { return works_ && finds_gradients_; }
    const void* gradient_of(PyObject* tensor) const {
        const char* impl = word<const char*>(tensor, impl_at_);
        const char* meta = impl == nullptr ? nullptr : word<const char*>(impl, meta_at_);
        return meta == nullptr ? nullptr : meta + gradient_at_;
    }
    static const char* impl_of(const void* handle) { return word<const char*>(handle, 0); }
    // Whether a handle refers to no tensor.
    bool undefined(const void* handle) const { return handle == nullptr || impl_of(handle) == no_tensor_; }

    // Counts a change of a tensor, as every operation of PyTorch in place does, so that autograd notices it. One that
    // was made in inference mode has no such count.
    bool counts_changes() const { return works_ && counts_changes_; }
    void count_change(PyObject* tensor) const {
        char* count = change_count_of(tensor);
        if (count != nullptr) __atomic_fetch_add(reinterpret_cast<std::uint32_t*>(count), 1u, __ATOMIC_SEQ_CST);
    }

    // Asks for the words of a tensor to come into the processor's cache.
    void fetch(const Look& look) const {
        if (look.image == nullptr) return;
        __builtin_prefetch(look.impl + storage_at_);
        fetch_image(look.impl);
        __builtin_prefetch(look.storage + data_at_);
    }
    void fetch_image(const char* impl) const {
        __builtin_prefetch(impl + image_at_);
        __builtin_prefetch(impl + image_at_ + 8 * Image::keys);
    }

private:
    bool found_ = false, works_ = false;
    // Of the Python object; of the tensor that it refers to; and of that one's storage.
    std::ptrdiff_t impl_at_ = 0;
    std::ptrdiff_t storage_at_ = 0, image_at_ = 0;
    std::ptrdiff_t data_at_ = 0;
    // Of the tensor, what autograd keeps of it, and of that, the gradient.
    bool finds_gradients_ = false;
    std::ptrdiff_t meta_at_ = 0, gradient_at_ = 0;
    const char* no_tensor_ = nullptr;  // what a handle refers to that refers to no tensor

    // Of the tensor, the object that counts its changes, and in that, the count.
    bool counts_changes_ = false;
    std::ptrdiff_t counter_at_ = 0, count_at_ = 0;

    template <class T>
    static T word(const void* object, std::ptrdiff_t at) {
        T value;
        std::memcpy(&value, static_cast<const char*>(object) + at, sizeof(value));
        return value;
    }

    std::int64_t of_image(const char* impl, std::int64_t index) const {
        return word<std::int64_t>(impl, image_at_ + 8 * index);
    }

    // In all but the offset. Without a branch for each word.
    bool fits(const char* impl, const Image& image) const {
        auto difference = [&](std::int64_t index) { return of_image(impl, index) ^ image.word[index]; };
        std::int64_t differences = difference(Image::kind) | difference(Image::keys) | difference(Image::dimensions);
        for (std::int64_t i = 0; i < image.word[Image::dimensions]; ++i)
            differences |= difference(Image::size + i) | difference(Image::stride + i);
        return differences == 0;
    }

    bool find_words(TensorReader& reader);
    bool sees_every_change(TensorReader& reader) const;
    bool find_gradients();
    bool find_change_count();

    char* change_count_of(PyObject* tensor) const {
        const char* impl = word<const char*>(tensor, impl_at_);
        char* counter = impl == nullptr ? nullptr : word<char*>(impl, counter_at_);
        return counter == nullptr ? nullptr : counter + count_at_;
    }
};

Glance& glance();

}  // namespace agr::python
