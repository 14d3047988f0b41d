#include "gradient_watch.h"

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace agr::python {
namespace {

std::int64_t device_of(const TensorView::Kind& kind) {
    return (static_cast<std::int64_t>(kind.device_type) << 32) + kind.device_index;
}

// Whether the elements fill one range of memory, without gaps and without overlaps, in any order.
bool is_dense(const TensorView& view) {
    const std::int32_t dimensions = view.kind.dimensions;
    std::int64_t expected = 1;
    std::int32_t i = dimensions;
    while (i > 0 && (view.shape[i - 1] == 1 || view.strides[i - 1] == expected)) expected *= view.shape[--i];
    if (i == 0 || view.elements() == 0) return true;
    // Not the usual order: from the smallest stride to the largest.
    std::vector<std::pair<std::int64_t, std::int64_t>> order;
    for (i = 0; i < dimensions; ++i)
        if (view.shape[i] != 1) order.emplace_back(view.strides[i], view.shape[i]);
    std::sort(order.begin(), order.end());
    expected = 1;
    for (const auto& [stride, size] : order) {
        if (stride != expected) return false;
        expected *= size;
    }
    return true;
}

}  // namespace

void GradientWatch::add(std::size_t index, std::shared_ptr<GradientTable> table, std::size_t slot,
                        py::object gradient) {
    Entry& entry = entries_.at(index);
    const TensorView view = reader().read_or_throw(gradient, "gradient");
    if (!view.type()) throw std::runtime_error("no kernel takes the type of the gradient");
    entry.update = Update::native;
    entry.class_ = py::type::of(gradient);
    entry.kind = view.kind;
    entry.elements = view.elements();
    place(entry, std::move(table), slot);
}

void GradientWatch::add_as_in(const GradientWatch& other, std::size_t index, std::shared_ptr<GradientTable> table,
                              std::size_t slot) {
    Entry& entry = entries_.at(index);
    entry = other.entries_.at(index);
    place(entry, std::move(table), slot);
}

void GradientWatch::place(Entry& entry, std::shared_ptr<GradientTable> table, std::size_t slot) {
    if (table->addresses.size() <= slot) table->addresses.resize(slot + 1);
    entry.table = std::move(table);
    entry.slot = slot;
}

void GradientWatch::add_shared(std::size_t index, std::size_t first) {
    Entry& entry = entries_.at(index);
    entry.update = Update::shared;
    entry.first = first;
}

void GradientWatch::add_by_reference(std::size_t index) { entries_.at(index).update = Update::by_reference; }

py::object GradientWatch::read(const py::list& parameters) {
    static PyObject* const grad = PyUnicode_InternFromString("grad");
    if (parameters.size() != entries_.size()) return py::none();
    py::list found;
    ranges_.clear();
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        Entry& entry = entries_[i];
        entry.gradient = nullptr;
        py::object gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameters[i].ptr(), grad));
        if (!gradient) throw py::error_already_set();
        const bool present = !gradient.is_none();
        switch (entry.update) {
            case Update::none:
                if (present) return py::none();
                break;
            case Update::by_reference:
                break;
            case Update::shared:
                if (present && gradient.ptr() != entries_[entry.first].gradient) return py::none();
                break;
            case Update::native:
                if (!present) {
                    entry.table->addresses[entry.slot] = nullptr;
                    break;
                }
                if (!fits(entry, gradient)) return py::none();
                entry.gradient = gradient.ptr();
                found.append(std::move(gradient));
        }
    }
    if (!apart()) return py::none();
    return found;
}

bool GradientWatch::fits(Entry& entry, const py::object& gradient) {
    if (Py_TYPE(gradient.ptr()) != reinterpret_cast<PyTypeObject*>(entry.class_.ptr())) return false;
    TensorView view;
    if (!reader().read(gradient.ptr(), view)) return false;
    entry.kind.dimensions = view.kind.dimensions;
    if (!(view.kind == entry.kind) || view.elements() != entry.elements || !is_dense(view)) return false;
    // Asked last, since it may run Python code of a subclass, after which the view would no longer be valid.
    const void* data = not_null(view.data());
    if (is_negative_view(gradient.ptr())) return false;
    entry.table->addresses[entry.slot] = data;
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const auto bytes = static_cast<std::uintptr_t>(entry.elements * entry.kind.bits / 8);
    if (bytes > 0) ranges_.push_back({begin, begin + bytes, device_of(entry.kind)});
    return true;
}

// Whether no two gradients of this call share memory: several threads or blocks would change it at once.
bool GradientWatch::apart() {
    auto before = [](const Range& a, const Range& b) {
        return a.device != b.device ? a.device < b.device : a.begin < b.begin;
    };
    if (!std::is_sorted(ranges_.begin(), ranges_.end(), before)) std::sort(ranges_.begin(), ranges_.end(), before);
    for (std::size_t i = 1; i < ranges_.size(); ++i)
        if (ranges_[i].device == ranges_[i - 1].device && ranges_[i].begin < ranges_[i - 1].end) return false;
    return true;
}

}  // namespace agr::python
