#include "watch.h"

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace agr::python {
namespace {

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// The tensor itself, or this process's part of a DTensor if `inner` is its name there; null if there is none.
py::object part_of(PyObject* tensor, PyObject* inner) {
    if (inner == nullptr) return py::reinterpret_borrow<py::object>(tensor);
    auto part = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, inner));
    if (!part) PyErr_Clear();
    return part;
}

}  // namespace

std::vector<Watch::Item> Watch::items_of(PyObject* dictionary) {
    std::vector<Item> items;
    Py_ssize_t position = 0;
    Item item{};
    while (PyDict_Next(dictionary, &position, &item.key, &item.value)) items.push_back(item);
    return items;
}

bool Watch::has_items(PyObject* dictionary, const std::vector<Item>& items) {
    if (static_cast<std::size_t>(PyDict_Size(dictionary)) != items.size()) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Item& item : items) {
        if (!PyDict_Next(dictionary, &position, &key, &value)) return false;
        if (key != item.key || value != item.value) return false;
    }
    return true;
}

Watch::Watch(py::list groups, py::dict state) {
    groups_ = keep(groups);
    state_ = keep(state);
    for (py::handle item : groups) {
        py::dict dictionary = py::cast<py::dict>(item);
        py::object given = dictionary["params"];
        if (!PyList_Check(given.ptr())) throw py::type_error("a parameter group's params is no list");
        py::list parameters = given;
        group_.push_back({keep(dictionary), keep(parameters), parameters.size()});
        for (py::handle parameter : parameters) {
            Entry entry;
            entry.parameter = keep(parameter);
            entries_.push_back(std::move(entry));
        }
    }
    state_items_ = items_of(state.ptr());
    for (const Item& item : state_items_) {
        keep(item.key);
        keep(item.value);
    }
}

PyObject* Watch::keep(py::handle object) {
    kept_.append(object);
    return object.ptr();
}

void Watch::add(std::size_t index, const std::vector<std::string>& keys, std::shared_ptr<GradientTable> table,
                std::size_t slot, py::object gradient_class, const std::string& gradient_type, py::object staged,
                py::object inner, py::object placements) {
    Entry& entry = entries_.at(index);
    entry.update = Update::native;
    entry.first = tensors_.size();
    if (!inner.is_none()) entry.inner = interned(py::cast<std::string>(inner).c_str());
    if (!placements.is_none()) entry.placements = keep(placements);
    expect(entry.parameter, entry.inner, "parameter");
    py::dict state = py::reinterpret_borrow<py::dict>(state_)[py::handle(entry.parameter)];
    entry.state = keep(state);
    for (const std::string& key : keys) {
        py::object tensor = state[py::str(key)];
        entry.keys.push_back(interned(key.c_str()));
        // A step count is an ordinary tensor even there.
        const bool whole = entry.inner != nullptr && PyObject_HasAttr(tensor.ptr(), entry.inner) != 0;
        expect(keep(tensor), whole ? entry.inner : nullptr, key.c_str());
    }
    entry.end = tensors_.size();
    entry.items = items_of(state.ptr());
    entry.gradient_class = reinterpret_cast<PyTypeObject*>(keep(gradient_class));
    entry.gradient_kind = tensors_[entry.first].kind;
    set_type(entry.gradient_kind, type_named(gradient_type));
    if (!staged.is_none()) entry.staged = not_null(reader().read_or_throw(keep(staged), "staged gradient").data());
    if (table->addresses.size() <= slot) table->addresses.resize(slot + 1);
    entry.table = std::move(table);
    entry.slot = slot;
}

void Watch::add_by_reference(std::size_t index) { entries_.at(index).update = Update::by_reference; }

void Watch::expect(PyObject* tensor, PyObject* inner, const char* role) {
    const py::object part = part_of(tensor, inner);
    if (!part) throw std::runtime_error(std::string("the part of a DTensor is not there, of the ") + role);
    const TensorView view = reader().read_or_throw(part, role);
    if (!view.type()) throw std::runtime_error(std::string("no kernel takes the type of the ") + role);
    tensors_.push_back({tensor, Py_TYPE(tensor), inner, view.data(), view.kind, sizes_.size()});
    sizes_.insert(sizes_.end(), view.shape, view.shape + view.kind.dimensions);
    sizes_.insert(sizes_.end(), view.strides, view.strides + view.kind.dimensions);
}

bool Watch::unchanged(py::handle groups, py::handle state) {
    release();
    const bool fits = all_fit(groups, state);
    if (!fits) release();
    return fits;
}

bool Watch::all_fit(py::handle groups, py::handle state) {
    static PyObject* const params = interned("params");
    if (groups.ptr() != groups_ || state.ptr() != state_) return false;
    if (static_cast<std::size_t>(PyList_GET_SIZE(groups_)) != group_.size()) return false;
    auto entry = entries_.begin();
    for (std::size_t i = 0; i < group_.size(); ++i) {
        const Group& group = group_[i];
        PyObject* dictionary = PyList_GET_ITEM(groups_, i);
        if (dictionary != group.dictionary) return false;
        PyObject* parameters = PyDict_GetItemWithError(dictionary, params);
        if (parameters != group.parameters) {
            PyErr_Clear();
            return false;
        }
        if (static_cast<std::size_t>(PyList_GET_SIZE(parameters)) != group.size) return false;
        for (std::size_t j = 0; j < group.size; ++j, ++entry)
            if (PyList_GET_ITEM(parameters, j) != entry->parameter || !parameter_fits(*entry)) return false;
    }
    if (!has_items(state_, state_items_)) return false;
    if (!updated_is_current_) list_updated();
    return true;
}

bool Watch::parameter_fits(Entry& entry) {
    static PyObject* const grad = interned("grad");
    if (entry.update == Update::by_reference) return true;
    py::object gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(entry.parameter, grad));
    if (!gradient) throw py::error_already_set();
    const bool present = !gradient.is_none();
    if (entry.update == Update::none) return !present;
    if (present != entry.present) updated_is_current_ = false;
    entry.present = present;
    // Of a parameter without a gradient too, so that state that was replaced is not kept alive here.
    if (!states_fit(entry)) return false;
    if (!present) {
        entry.table->addresses[entry.slot] = nullptr;
        return true;
    }
    for (std::size_t i = entry.first; i < entry.end; ++i)
        if (!fits(tensors_[i])) return false;
    if (!gradient_fits(entry, gradient.ptr())) return false;
    gradients_.push_back(std::move(gradient));
    return true;
}

bool Watch::fits(const Expected& expected) const {
    TensorView view;
    const py::object part = part_of(expected.tensor, expected.inner);
    if (!part || !reader().read(part.ptr(), view)) return false;
    if (view.data() != expected.data || Py_TYPE(expected.tensor) != expected.class_ || !(view.kind == expected.kind))
        return false;
    const std::int64_t* sizes = sizes_.data() + expected.sizes_at;
    const std::int64_t* strides = sizes + view.kind.dimensions;
    for (std::int32_t i = 0; i < view.kind.dimensions; ++i)
        if (view.shape[i] != sizes[i] || view.strides[i] != strides[i]) return false;
    return true;
}

// Others may keep their own things beside our states.
bool Watch::states_fit(Entry& entry) {
    if (has_items(entry.state, entry.items)) return true;
    for (std::size_t i = 0; i < entry.keys.size(); ++i) {
        if (PyDict_GetItemWithError(entry.state, entry.keys[i]) != tensors_[entry.first + 1 + i].tensor) {
            PyErr_Clear();
            return false;
        }
    }
    entry.items = items_of(entry.state);
    return true;
}

bool Watch::gradient_fits(Entry& entry, PyObject* gradient) {
    static PyObject* const placements = interned("placements");
    if (Py_TYPE(gradient) != entry.gradient_class) return false;
    if (entry.placements != nullptr) {
        const py::object placed = py::reinterpret_borrow<py::object>(gradient).attr(py::handle(placements));
        const int same = PyObject_RichCompareBool(placed.ptr(), entry.placements, Py_EQ);
        if (same < 0) throw py::error_already_set();
        if (same == 0) return false;
    } else if (entry.inner != nullptr) {
        entry.table->addresses[entry.slot] = entry.staged;
        return true;
    }
    const py::object part = part_of(gradient, entry.inner);
    TensorView view;
    if (!part || !reader().read(part.ptr(), view) || !(view.kind == entry.gradient_kind)) return false;
    const std::int64_t* sizes = sizes_.data() + tensors_[entry.first].sizes_at;
    const std::int64_t* strides = sizes + view.kind.dimensions;
    bool same_layout = true;
    for (std::int32_t i = 0; i < view.kind.dimensions; ++i) {
        if (view.shape[i] != sizes[i]) return false;
        same_layout &= sizes[i] == 1 || view.strides[i] == strides[i];
    }
    if (!same_layout && entry.staged == nullptr && view.elements() > 0) return false;
    // What is copied before the step is taken for what it stands for.
    if (entry.staged == nullptr && is_negative_view(part.ptr())) return false;
    entry.table->addresses[entry.slot] = entry.staged != nullptr ? entry.staged : not_null(view.data());
    return true;
}

void Watch::list_updated() {
    updated_ = py::list();
    for (const Entry& entry : entries_)
        if (entry.present) updated_.append(py::handle(entry.parameter));
    updated_is_current_ = true;
}

int Watch::traverse(visitproc visit, void* arg) const {
    Py_VISIT(kept_.ptr());
    Py_VISIT(updated_.ptr());
    for (const py::object& gradient : gradients_) Py_VISIT(gradient.ptr());
    return 0;
}

void Watch::clear() {
    // Nothing of what follows is looked at again without the objects that it points to.
    entries_.clear();
    tensors_.clear();
    group_.clear();
    state_items_.clear();
    groups_ = state_ = nullptr;
    release();
    kept_ = py::list();
    updated_ = py::list();
}

}  // namespace agr::python
