// Notices that a plan no longer fits what it was made for, and reads where this step's gradients are.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "glance.h"
#include "handles.h"
#include "tensor_reader.h"

namespace agr::python {

// Where the gradients of one executor's tensors are in this step.
struct GradientTable {
    std::vector<const void*> addresses;
};

// Compares an optimizer's parameter groups, its state, and every tensor in them with what they were when the plan was
// made. Whatever a program can do to them between two steps is noticed: groups or parameters added, replaced or
// reordered; state loaded, replaced or moved; parameters moved, resized or re-pointed; gradients that appear, vanish,
// or change layout or type.
class Watch {
public:
    Watch(pybind11::list groups, pybind11::dict state);

    // The parameter at `index`, counted over all groups, is updated from the gradient `slot` of `table`. Its state
    // tensors are those under `keys`. `relaid` is None, or a tensor with the parameter's layout into which the
    // gradient, which has another, is copied before each step.
    void add(std::size_t index, std::vector<std::string> keys, std::shared_ptr<GradientTable> table, std::size_t slot,
             pybind11::object relaid);

    // The parameter at `index` has a gradient, and what is done with it does not depend on where anything is.
    void add_untabled(std::size_t index);

    // True if nothing has changed; then the tables hold this step's addresses, and the gradients stay alive until
    // release().
    bool unchanged(pybind11::handle groups, pybind11::handle state);

    // Counts a change of every tabled parameter, as operations of PyTorch in place do; false if it has to be asked to.
    bool count_changes() const;

    void release() {
        // Taken first, as in Handles::release.
        const std::vector<pybind11::object> held = std::move(held_);
        held_.clear();
        handles_.release();
    }

    int traverse(visitproc visit, void* arg) const;
    void clear();

private:
    // A tensor as it was. What every step looks at lies together; the rest is for when that has changed.
    struct Expected {
        // Kept alive by kept_; null for a gradient, which may be another object in every step.
        PyObject* object = nullptr;
        Look look;

        Expected() = default;
        Expected(PyObject* tensor, const char* role, Images& images);
        // Whether `tensor` fits, and where it then is.
        bool find(PyObject* tensor, void*& there, Images& images);
        bool stays_as_pytorch_says(Images& images);
        void* data() const { return description->data; }

    private:
        struct Description {
            PyTypeObject* class_;
            void* data;
            Type type;
            std::int32_t device_type, device_index;
            std::vector<std::int64_t> shape, strides;
        };
        std::unique_ptr<Description> description;

        bool fits(PyObject* tensor, const TensorView& view) const;  // in all but the address
    };

    struct Item {
        PyObject* key;
        PyObject* value;
    };

    enum class Gradient : std::uint8_t { none, untabled, tabled };

    struct Entry {
        PyObject* parameter = nullptr;
        // Its class, if its gradient may be looked at where PyTorch keeps it, and not through Python.
        PyTypeObject* class_ = nullptr;
        Gradient gradient = Gradient::none;
        Expected as_gradient;
        PyObject* state = nullptr;  // the parameter's dictionary
        std::vector<Item> items;    // all of it, in its order; not kept alive, but for the states among it
        std::vector<PyObject*> keys;
        // Which of tensors_ are the parameter and then the states under these keys.
        std::size_t first = 0, end = 0;
        std::shared_ptr<GradientTable> table;
        std::size_t slot = 0;
        const void* relaid = nullptr;
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
    Images images_;
    std::vector<Item> state_items_;
    // Owns every object above. A list, which the garbage collector is shown, because a parameter's hooks may refer back
    // to the optimizer.
    pybind11::list kept_;
    // This step's gradients, kept alive.
    std::vector<pybind11::object> held_;
    Handles handles_;

    static std::vector<Item> items_of(PyObject* dictionary);
    // Whether a dictionary has these entries, in this order.
    static bool has_items(PyObject* dictionary, const std::vector<Item>& items);

    PyObject* keep(pybind11::handle object);
    void fetch(std::size_t index) const;
    bool parameter_unchanged(Entry& entry);
    bool tensors_unchanged(Entry& entry);
    bool gradient_unchanged(Entry& entry, const void* handle);
    bool gradient_unchanged_as_python_says(Entry& entry);
    bool has_states(Entry& entry);
};

}  // namespace agr::python
