#include "watch.h"

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace agr::python {
namespace {

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// No description tells.
bool stands_for_its_negative(PyObject* tensor) {
    static PyObject* const is_neg = interned("is_neg");
    py::object answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, is_neg));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
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

Watch::Expected::Expected(PyObject* tensor, const char* role) : object(tensor) {
    const TensorView view = reader().read_or_throw(tensor, role);
    if (!view.type) throw std::runtime_error(std::string("no kernel takes the type of the ") + role);
    data = view.data;
    type = *view.type;
    device_type = view.device_type;
    device_index = view.device_index;
    shape.assign(view.shape, view.shape + view.dimensions);
    strides.assign(view.strides, view.strides + view.dimensions);
    look = glance().look(tensor, view);
}

bool Watch::Expected::fits(const TensorView& view) const {
    return view.type == type && view.device_type == device_type && view.device_index == device_index &&
           static_cast<std::size_t>(view.dimensions) == shape.size() &&
           std::equal(shape.begin(), shape.end(), view.shape) &&
           std::equal(strides.begin(), strides.end(), view.strides);
}

bool Watch::Expected::find(PyObject* tensor, void*& there) {
    there = glance().find(tensor, look);
    if (there != nullptr) return true;
    TensorView view;
    if (!reader().read(tensor, view) || !fits(view) || stands_for_its_negative(tensor)) return false;
    // Next time it looks as it does now: its class or flags may have changed, which need not fit.
    look = glance().look(tensor, view);
    there = view.data;
    return true;
}

bool Watch::Expected::stays() {
    void* there;
    return find(object, there) && there == data;
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

void Watch::add(std::size_t index, std::vector<std::string> keys, std::shared_ptr<GradientTable> table,
                std::size_t slot, py::object relaid) {
    Entry& entry = entries_.at(index);
    py::handle parameter = entry.parameter;
    entry.as_parameter = Expected(entry.parameter, "parameter");
    entry.as_gradient = Expected(py::object(parameter.attr("grad")).ptr(), "gradient");
    entry.as_gradient.object = nullptr;
    py::dict state = py::reinterpret_borrow<py::dict>(state_)[parameter];
    entry.state = keep(state);
    for (const std::string& key : keys) {
        py::object tensor = state[py::str(key)];
        entry.keys.push_back(interned(key.c_str()));
        entry.states.emplace_back(keep(tensor), key.c_str());
    }
    entry.items = items_of(state.ptr());
    if (!relaid.is_none()) entry.relaid = Expected(keep(relaid), "copy of the gradient").data;
    if (table->addresses.size() <= slot) table->addresses.resize(slot + 1);
    entry.table = std::move(table);
    entry.slot = slot;
    entry.gradient = Gradient::tabled;
}

void Watch::add_untabled(std::size_t index) { entries_.at(index).gradient = Gradient::untabled; }

bool Watch::unchanged(py::handle groups, py::handle state) {
    static PyObject* const params = interned("params");
    held_.clear();
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
        for (std::size_t j = 0; j < group.size; ++j, ++entry) {
            if (PyList_GET_ITEM(parameters, j) != entry->parameter || !parameter_unchanged(*entry)) return false;
        }
    }
    return has_items(state_, state_items_);
}

bool Watch::parameter_unchanged(Entry& entry) {
    static PyObject* const grad = interned("grad");
    py::object gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(entry.parameter, grad));
    if (!gradient) throw py::error_already_set();
    if (entry.gradient == Gradient::none) return gradient.is_none();
    if (gradient.is_none()) return false;
    if (entry.gradient == Gradient::untabled) return true;

    void* there;
    if (!entry.as_parameter.stays() || !states_unchanged(entry) || !entry.as_gradient.find(gradient.ptr(), there))
        return false;
    entry.table->addresses[entry.slot] = entry.relaid != nullptr ? entry.relaid : there;
    held_.push_back(std::move(gradient));
    return true;
}

bool Watch::states_unchanged(Entry& entry) {
    // Others may keep their own things beside our states.
    if (!has_items(entry.state, entry.items)) {
        for (std::size_t i = 0; i < entry.keys.size(); ++i) {
            if (PyDict_GetItemWithError(entry.state, entry.keys[i]) != entry.states[i].object) {
                PyErr_Clear();
                return false;
            }
        }
        entry.items = items_of(entry.state);
    }
    for (Expected& state : entry.states)
        if (!state.stays()) return false;
    return true;
}

int Watch::traverse(visitproc visit, void* arg) const {
    Py_VISIT(kept_.ptr());
    for (const py::object& object : held_) Py_VISIT(object.ptr());
    return 0;
}

void Watch::clear() {
    // Nothing of what follows is looked at again without the objects that it points to.
    entries_.clear();
    group_.clear();
    state_items_.clear();
    groups_ = state_ = nullptr;
    held_.clear();
    kept_ = py::list();
}

}  // namespace agr::python
