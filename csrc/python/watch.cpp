#include "watch.h"

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace agr::python {
namespace {

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

}  // namespace

Watch::Expected::Expected(PyObject* tensor, const char* role) : object(tensor) {
    const TensorView view = reader().read_or_throw(tensor, role);
    if (!view.type) throw std::runtime_error(std::string("no kernel takes the type of the ") + role);
    data = view.data;
    type = *view.type;
    device_type = view.device_type;
    device_index = view.device_index;
    shape.assign(view.shape, view.shape + view.dimensions);
    strides.assign(view.strides, view.strides + view.dimensions);
}

bool Watch::Expected::fits(const TensorView& view) const {
    return view.type == type && view.device_type == device_type && view.device_index == device_index &&
           static_cast<std::size_t>(view.dimensions) == shape.size() &&
           std::equal(shape.begin(), shape.end(), view.shape) &&
           std::equal(strides.begin(), strides.end(), view.strides);
}

void Watch::Hint::fetch() const {
    // PyTorch keeps sizes and strides in the middle of its own object, which takes a few cache lines around them.
    const char* middle = static_cast<const char*>(description);
    __builtin_prefetch(object);
    for (int line = -2; line <= 1; ++line) __builtin_prefetch(middle + 64 * line);
}

void Watch::Entry::fetch() const {
    parameter_hint.fetch();
    gradient_hint.fetch();
    __builtin_prefetch(state);
    for (const State& s : states) s.hint.fetch();
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
    for (auto item : state) state_items_.emplace_back(keep(item.first), keep(item.second));
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
        entry.states.push_back({interned(key.c_str()), Expected(keep(tensor), key.c_str()), {}});
    }
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
    constexpr int fetched_ahead = 6;
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
            if (entries_.end() - entry > fetched_ahead) entry[fetched_ahead].fetch();
            if (PyList_GET_ITEM(parameters, j) != entry->parameter || !parameter_unchanged(*entry)) return false;
        }
    }
    return state_unchanged(state_);
}

bool Watch::parameter_unchanged(Entry& entry) {
    static PyObject* const grad = interned("grad");
    py::object gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(entry.parameter, grad));
    if (!gradient) throw py::error_already_set();
    if (entry.gradient == Gradient::none) return gradient.is_none();
    if (gradient.is_none()) return false;
    if (entry.gradient == Gradient::untabled) return true;

    TensorView view;
    if (!reader().read(entry.parameter, view) || view.data != entry.as_parameter.data || !entry.as_parameter.fits(view))
        return false;
    entry.parameter_hint = {entry.parameter, view.shape};
    for (State& state : entry.states) {
        PyObject* tensor = PyDict_GetItemWithError(entry.state, state.key);
        if (tensor != state.tensor.object) {
            PyErr_Clear();
            return false;
        }
        if (!reader().read(tensor, view) || view.data != state.tensor.data || !state.tensor.fits(view)) return false;
        state.hint = {tensor, view.shape};
    }
    if (!reader().read(gradient.ptr(), view) || !entry.as_gradient.fits(view)) return false;
    entry.gradient_hint = {gradient.ptr(), view.shape};
    entry.table->addresses[entry.slot] = entry.relaid != nullptr ? entry.relaid : view.data;
    held_.push_back(std::move(gradient));
    return true;
}

bool Watch::state_unchanged(PyObject* state) const {
    if (static_cast<std::size_t>(PyDict_Size(state)) != state_items_.size()) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const auto& item : state_items_) {
        if (!PyDict_Next(state, &position, &key, &value)) return false;
        if (key != item.first || value != item.second) return false;
    }
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
