// Notices that a plan no longer fits what it was made for, and reads where this step's gradients are.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tensor_reader.h"

namespace agr::python {

// Where the gradients of one executor's tensors are in this step; null for a tensor that has none.
struct GradientTable {
    std::vector<const void*> addresses;
};

// Compares an optimizer's parameter groups, its state, and every tensor in them with what they were when the plan was
// made. Whatever a program can do to them between two steps is noticed: groups or parameters added, replaced or
// reordered; state loaded, replaced or moved; parameters moved, resized or given other memory; gradients of another
// layout or type, and a gradient of a parameter that the plan does not update. A gradient that is missing fits the
// plan: its address is null, and its parameter and state tensors are not read.
//
// Everything is read through Python's C API, DLPack's exchange interface and PyTorch's Python methods.
class Watch {
public:
    Watch(pybind11::list groups, pybind11::dict state);

    // The parameter at `index`, counted over all groups, is updated from the gradient at `slot` of `table`, which is of
    // `gradient_class` and of the type called `gradient_type`. Its state tensors are those under `keys`. Unless
    // `staged` is None, the gradient may have any layout, since it is copied into `staged` before each step.
    //
    // If the parameter is a DTensor, `inner` is the name of the attribute that is this process's part of it, of its
    // gradient and of its averages; otherwise None. The gradient has these `placements`; it may have any, and is not
    // looked at, if they are None and it is staged.
    void add(std::size_t index, const std::vector<std::string>& keys, std::shared_ptr<GradientTable> table,
             std::size_t slot, pybind11::object gradient_class, const std::string& gradient_type,
             pybind11::object staged, pybind11::object inner, pybind11::object placements);

    // The parameter at `index` is updated by operations of PyTorch, which find everything themselves.
    void add_by_reference(std::size_t index);

    // Whether the plan still fits. Then the tables have this step's addresses, and the gradients stay alive until
    // release().
    bool unchanged(pybind11::handle groups, pybind11::handle state);

    // The parameters that the native executors update in this step.
    pybind11::list updated() const { return updated_; }

    void release() {
        while (!gradients_.empty()) {
            // Taken out first: the end of a gradient may lead to another step, and so back to here.
            const pybind11::object gradient = std::move(gradients_.back());
            gradients_.pop_back();
        }
    }

    int traverse(visitproc visit, void* arg) const;
    void clear();

private:
    // A tensor as it was when the plan was made.
    struct Expected {
        PyObject* tensor;  // kept alive by kept_
        PyTypeObject* class_;
        PyObject* inner;  // the name of the attribute that is the part of a DTensor; null for other tensors
        void* data;
        TensorView::Kind kind;
        std::size_t sizes_at;  // in sizes_: its sizes, and then its strides
    };

    struct Item {
        PyObject* key;
        PyObject* value;
    };

    enum class Update : std::uint8_t { none, by_reference, native };

    // A parameter of the optimizer, in the order of its groups.
    struct Entry {
        PyObject* parameter = nullptr;
        Update update = Update::none;
        bool present = false;         // has a gradient in this step
        std::size_t first = 0;        // of its tensors among tensors_: the parameter, and then its states
        std::size_t end = 0;          // of those
        PyObject* state = nullptr;    // the parameter's dictionary
        std::vector<Item> items;      // all of it, in its order; of these, the states alone are kept alive
        std::vector<PyObject*> keys;  // of its states
        PyTypeObject* gradient_class = nullptr;
        TensorView::Kind gradient_kind{};
        const void* staged = nullptr;
        PyObject* inner = nullptr;       // of the gradient, as in Expected
        PyObject* placements = nullptr;  // of a gradient that is a DTensor
        std::shared_ptr<GradientTable> table;
        std::size_t slot = 0;
    };

    struct Group {
        PyObject* dictionary;
        PyObject* parameters;  // the list
        std::size_t size;
    };

    PyObject* groups_;
    PyObject* state_;
    std::vector<Group> group_;
    std::vector<Entry> entries_;
    std::vector<Expected> tensors_;
    std::vector<std::int64_t> sizes_;
    std::vector<Item> state_items_;
    // Owns every object above. A list, which the garbage collector is shown, because a parameter's hooks may refer back
    // to the optimizer.
    pybind11::list kept_;
    pybind11::list updated_;
    bool updated_is_current_ = true;           // not where a parameter has gained or lost its gradient since
    std::vector<pybind11::object> gradients_;  // this step's, kept alive

    static std::vector<Item> items_of(PyObject* dictionary);
    // Whether a dictionary has these entries, in this order.
    static bool has_items(PyObject* dictionary, const std::vector<Item>& items);

    PyObject* keep(pybind11::handle object);
    void expect(PyObject* tensor, PyObject* inner, const char* role);
    bool all_fit(pybind11::handle groups, pybind11::handle state);
    bool fits(const Expected& expected) const;
    bool parameter_fits(Entry& entry);
    bool states_fit(Entry& entry);
    bool gradient_fits(Entry& entry, PyObject* gradient);
    void list_updated();
};

}  // namespace agr::python
