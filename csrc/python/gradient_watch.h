// Notices that the gradients of a list of parameters no longer fit the launches that were made for them, and reads
// where they are. For regularize_gradients_, which changes gradients and nothing else.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "tensor_reader.h"
#include "watch.h"

namespace agr::python {

// A launch depends on each gradient's number of elements, type and device, and not on its shape or address: a gradient
// fits if those are the same, and if its elements fill one range of memory that no other gradient touches. A gradient
// that is missing fits too: its address is null. Neither parameters nor gradients are kept alive between calls.
class GradientWatch {
public:
    // For a list of so many parameters. Until it is added, a parameter is expected to have no gradient.
    explicit GradientWatch(std::size_t parameters) : entries_(parameters) {}

    // The gradient of the parameter at `index` is found at `slot` of `table`, and is one like `gradient`.
    void add(std::size_t index, std::shared_ptr<GradientTable> table, std::size_t slot, pybind11::object gradient);

    // The gradient of the parameter at `index` is one as in another watch for as many parameters.
    void add_as_in(const GradientWatch& other, std::size_t index, std::shared_ptr<GradientTable> table,
                   std::size_t slot);

    // The gradient of the parameter at `index` is the one of the parameter at `first`, the same object.
    void add_shared(std::size_t index, std::size_t first);

    // The gradient of the parameter at `index` is left to operations of PyTorch, which find everything themselves.
    void add_by_reference(std::size_t index);

    // The gradients that launches work on, whose addresses are in the tables then; None if anything no longer fits.
    pybind11::object read(const pybind11::list& parameters);

private:
    enum class Update : std::uint8_t { none, native, shared, by_reference };

    // A parameter of the list.
    struct Entry {
        Update update = Update::none;
        pybind11::object class_;  // of its gradient
        TensorView::Kind kind{};  // of its gradient, but for the number of dimensions
        std::int64_t elements = 0;
        std::shared_ptr<GradientTable> table;
        std::size_t slot = 0;
        std::size_t first = 0;         // of a shared gradient: the parameter that it was added with
        PyObject* gradient = nullptr;  // only during a call
    };

    struct Range {
        std::uintptr_t begin, end;
        std::int64_t device;
    };

    std::vector<Entry> entries_;
    std::vector<Range> ranges_;  // of the memory of the gradients of this call

    static void place(Entry& entry, std::shared_ptr<GradientTable> table, std::size_t slot);
    bool fits(Entry& entry, const pybind11::object& gradient);
    bool apart();
};

}  // namespace agr::python
