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

// Whether a tensor's gradient is what torch.Tensor says it is, and not what a class of somebody's own does.
bool has_ordinary_gradient(py::handle tensor) {
    const py::module_ torch = py::module_::import("torch");
    const py::object base = torch.attr("Tensor");
    if (!py::isinstance(tensor, base)) return false;
    const py::type own = py::type::of(tensor);
    if (!own.attr("grad").is(base.attr("grad"))) return false;
    // Which may answer for every attribute. A method of a class is another object each time it is asked for.
    auto function_of = [](const py::object& of) { return py::getattr(of, "__func__", of); };
    const py::object intercepts = function_of(own.attr("__torch_function__"));
    return intercepts.is(function_of(base.attr("__torch_function__"))) ||
           intercepts.is(torch.attr("_C").attr("_disabled_torch_function_impl"));
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

Watch::Expected::Expected(PyObject* tensor, const char* role, Images& images) : object(tensor) {
    const TensorView view = reader().read_or_throw(tensor, role);
    if (!view.type) throw std::runtime_error(std::string("no kernel takes the type of the ") + role);
    description.reset(new Description{Py_TYPE(tensor),
                                      view.data,
                                      *view.type,
                                      view.device_type,
                                      view.device_index,
                                      {view.shape, view.shape + view.dimensions},
                                      {view.strides, view.strides + view.dimensions}});
    look = glance().look(tensor, view, images);
}

bool Watch::Expected::fits(PyObject* tensor, const TensorView& view) const {
    const Description& d = *description;
    return Py_TYPE(tensor) == d.class_ && view.type == d.type && view.device_type == d.device_type &&
           view.device_index == d.device_index && static_cast<std::size_t>(view.dimensions) == d.shape.size() &&
           std::equal(d.shape.begin(), d.shape.end(), view.shape) &&
           std::equal(d.strides.begin(), d.strides.end(), view.strides);
}

bool Watch::Expected::find(PyObject* tensor, void*& there, Images& images) {
    there = glance().find(tensor, look);
    if (there != nullptr) return true;
    TensorView view;
    if (!reader().read(tensor, view) || !fits(tensor, view) || stands_for_its_negative(tensor)) return false;
    look = glance().look(tensor, view, images);  // as it shall look next time
    there = view.data;
    return true;
}

bool Watch::Expected::stays_as_pytorch_says(Images& images) {
    TensorView view;
    if (!reader().read(object, view) || view.data != data() || !fits(object, view) || stands_for_its_negative(object))
        return false;
    // Next time it looks as it does now: flags may have changed that need not fit.
    look = glance().look(object, view, images);
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
            if (glance().finds_gradients() && Handles::work() && has_ordinary_gradient(parameter))
                entry.class_ = Py_TYPE(parameter.ptr());
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
    entry.first = tensors_.size();
    tensors_.emplace_back(entry.parameter, "parameter", images_);
    entry.as_gradient = Expected(py::object(parameter.attr("grad")).ptr(), "gradient", images_);
    entry.as_gradient.object = nullptr;
    py::dict state = py::reinterpret_borrow<py::dict>(state_)[parameter];
    entry.state = keep(state);
    for (const std::string& key : keys) {
        py::object tensor = state[py::str(key)];
        entry.keys.push_back(interned(key.c_str()));
        tensors_.emplace_back(keep(tensor), key.c_str(), images_);
    }
    entry.end = tensors_.size();
    entry.items = items_of(state.ptr());
    if (!relaid.is_none()) entry.relaid = Expected(keep(relaid), "copy of the gradient", images_).data();
    if (table->addresses.size() <= slot) table->addresses.resize(slot + 1);
    entry.table = std::move(table);
    entry.slot = slot;
    entry.gradient = Gradient::tabled;
}

void Watch::add_untabled(std::size_t index) { entries_.at(index).gradient = Gradient::untabled; }

bool Watch::unchanged(py::handle groups, py::handle state) {
    static PyObject* const params = interned("params");
    release();
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
            fetch(static_cast<std::size_t>(entry - entries_.begin()));
            if (PyList_GET_ITEM(parameters, j) != entry->parameter || !parameter_unchanged(*entry)) return false;
        }
    }
    return has_items(state_, state_items_);
}

bool Watch::parameter_unchanged(Entry& entry) {
    if (entry.class_ == nullptr || Py_TYPE(entry.parameter) != entry.class_)
        return gradient_unchanged_as_python_says(entry) && tensors_unchanged(entry);
    const void* handle = glance().gradient_of(entry.parameter);
    if (glance().undefined(handle)) return entry.gradient == Gradient::none;
    switch (entry.gradient) {
        case Gradient::none:
            return false;
        case Gradient::untabled:
            return true;
        case Gradient::tabled:
            return tensors_unchanged(entry) && gradient_unchanged(entry, handle);
    }
    return false;
}

bool Watch::tensors_unchanged(Entry& entry) {
    if (entry.gradient != Gradient::tabled) return true;
    if (!has_states(entry)) return false;
    const Glance& glances = glance();
    for (std::size_t i = entry.first; i < entry.end; ++i) {
        Expected& tensor = tensors_[i];
        if (!glances.same(tensor.object, tensor.look) && !tensor.stays_as_pytorch_says(images_)) return false;
    }
    return true;
}

// Others may keep their own things beside our states.
bool Watch::has_states(Entry& entry) {
    if (has_items(entry.state, entry.items)) return true;
    for (std::size_t i = 0; i < entry.keys.size(); ++i) {
        if (PyDict_GetItemWithError(entry.state, entry.keys[i]) != tensors_[entry.first + 1 + i].object) {
            PyErr_Clear();
            return false;
        }
    }
    entry.items = items_of(entry.state);
    return true;
}

bool Watch::gradient_unchanged(Entry& entry, const void* handle) {
    void* there = glance().find_impl(Glance::impl_of(handle), entry.as_gradient.look);
    if (there == nullptr || !handles_.hold(handle)) return gradient_unchanged_as_python_says(entry);
    entry.table->addresses[entry.slot] = entry.relaid != nullptr ? entry.relaid : there;
    return true;
}

bool Watch::gradient_unchanged_as_python_says(Entry& entry) {
    static PyObject* const grad = interned("grad");
    py::object gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(entry.parameter, grad));
    if (!gradient) throw py::error_already_set();
    if (entry.gradient == Gradient::none) return gradient.is_none();
    if (gradient.is_none()) return false;
    if (entry.gradient == Gradient::untabled) return true;

    void* there;
    if (!entry.as_gradient.find(gradient.ptr(), there, images_)) return false;
    entry.table->addresses[entry.slot] = entry.relaid != nullptr ? entry.relaid : there;
    held_.push_back(std::move(gradient));
    return true;
}

// So that the words of several tensors are under way at once where they are not in the cache: a backward pass has gone
// through it since the last step.
void Watch::fetch(std::size_t index) const {
    const Glance& glances = glance();
    constexpr std::size_t far = 8, near = 4;
    if (index + far < entries_.size()) {
        const Entry& entry = entries_[index + far];
        for (std::size_t i = entry.first; i < entry.end; ++i) {
            __builtin_prefetch(tensors_[i].object);
            glances.fetch(tensors_[i].look);
        }
    }
    if (index + near < entries_.size()) {
        const Entry& entry = entries_[index + near];
        if (entry.class_ == nullptr) return;
        const void* handle = glances.gradient_of(entry.parameter);
        if (!glances.undefined(handle)) glances.fetch_image(Glance::impl_of(handle));
    }
}

bool Watch::count_changes() const {
    const Glance& glances = glance();
    if (!glances.counts_changes()) return false;
    for (const Entry& entry : entries_)
        if (entry.gradient == Gradient::tabled && entry.class_ == nullptr) return false;
    for (const Entry& entry : entries_)
        if (entry.gradient == Gradient::tabled) glances.count_change(entry.parameter);
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
    tensors_.clear();
    group_.clear();
    state_items_.clear();
    groups_ = state_ = nullptr;
    release();
    kept_ = py::list();
}

}  // namespace agr::python
