#include "tensor_reader.h"

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace agr::python {

namespace {

// DLPack's numbering of types.
constexpr std::uint8_t unsigned_integer = 1, floating_point = 2, brain_float = 4;

struct NamedType {
    const char* name;
    Type type;
    std::uint8_t code, bits;
};
constexpr NamedType types[] = {
    {"float32", Type::float32, floating_point, 32}, {"bfloat16", Type::bfloat16, brain_float, 16},
    {"float16", Type::float16, floating_point, 16}, {"float64", Type::float64, floating_point, 64},
    {"uint8", Type::code8, unsigned_integer, 8},
};

// The part of DLPack's binary interface, version 1.3, that is used here.
struct ExchangeAPI {
    std::uint32_t major_version, minor_version;
    ExchangeAPI* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_object;
    void* managed_tensor_to_object;
    int (*tensor_from_object)(void* object, TensorView* out);
    void* current_work_stream;
};

// torch.Tensor's names, interned once.
struct Names {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* device = PyUnicode_InternFromString("device");
    PyObject* type = PyUnicode_InternFromString("type");
    PyObject* index = PyUnicode_InternFromString("index");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* layout = PyUnicode_InternFromString("layout");
    py::object torch = py::module_::import("torch");
    py::object strided = torch.attr("strided");
};

const Names& names() {
    static const Names* interned = new Names;  // outlives the interpreter
    return *interned;
}

ExchangeAPI* find_exchange_api() {
    py::object tensor = py::module_::import("torch").attr("Tensor");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return nullptr;
    py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* api = static_cast<ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    // What is used here has stayed the same throughout version 1.
    while (api != nullptr && api->major_version != 1) api = api->previous;
    return api;
}

}  // namespace

Type type_named(const std::string& name) {
    for (const NamedType& type : types)
        if (name == std::string("torch.") + type.name) return type.type;
    throw std::invalid_argument("no kernel takes " + name);
}

void set_type(TensorView::Kind& kind, Type wanted) {
    for (const NamedType& type : types)
        if (type.type == wanted) kind.code = type.code, kind.bits = type.bits;
}

std::optional<Type> TensorView::type() const {
    for (const NamedType& type : types)
        if (kind.lanes == 1 && kind.code == type.code && kind.bits == type.bits) return type.type;
    return std::nullopt;
}

TensorReader::TensorReader() { use_exchange_api(true); }

void TensorReader::use_exchange_api(bool wanted) {
    ExchangeAPI* api = wanted ? find_exchange_api() : nullptr;
    describe_ = api != nullptr ? api->tensor_from_object : nullptr;
}

TensorView TensorReader::read_or_throw(py::handle tensor, const char* role) {
    TensorView view;
    if (!read(tensor.ptr(), view))
        throw std::runtime_error(std::string("the ") + role + " " + std::string(py::str(py::type::of(tensor))) +
                                 " is no dense tensor in memory");
    return view;
}

bool TensorReader::read_by_methods(PyObject* tensor, TensorView& view) {
    const Names& n = names();
    auto attribute = [&](PyObject* of, PyObject* name) {
        return py::reinterpret_steal<py::object>(PyObject_GetAttr(of, name));
    };
    auto call = [&](PyObject* name) {
        return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
    };
    if (!attribute(tensor, n.layout).is(n.strided)) return false;
    py::object address = call(n.data_ptr), dtype = attribute(tensor, n.dtype), device = attribute(tensor, n.device);
    py::object shape = attribute(tensor, n.shape), strides = call(n.stride);
    if (!address || !dtype || !device || !shape || !strides) return false;
    py::object device_type = attribute(device.ptr(), n.type), device_index = attribute(device.ptr(), n.index);
    if (!device_type || !device_index) return false;

    view = {};
    view.memory = PyLong_AsVoidPtr(address.ptr());
    for (const NamedType& type : types)
        if (dtype.is(n.torch.attr(type.name))) view.kind.code = type.code, view.kind.bits = type.bits;
    view.kind.lanes = 1;
    const char* device_name = PyUnicode_AsUTF8(device_type.ptr());
    if (device_name == nullptr) return false;
    const std::string where = device_name;
    view.kind.device_type = where == "cpu" ? cpu_device : where == "cuda" ? cuda_device : other_device;
    view.kind.device_index = device_index.is_none() ? 0 : static_cast<std::int32_t>(PyLong_AsLong(device_index.ptr()));
    const auto dimensions = static_cast<std::int32_t>(PyTuple_GET_SIZE(shape.ptr()));
    view.kind.dimensions = dimensions;
    buffer_.clear();
    for (PyObject* tuple : {shape.ptr(), strides.ptr()})
        for (std::int32_t i = 0; i < dimensions; ++i) buffer_.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
    view.shape = buffer_.data();
    view.strides = buffer_.data() + dimensions;
    return PyErr_Occurred() == nullptr;
}

bool is_negative_view(PyObject* tensor) {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    py::object answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, is_neg));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
}

const void* not_null(const void* data) {
    static const char nothing = 0;
    return data != nullptr ? data : &nothing;
}

TensorReader& reader() {
    static TensorReader* only = new TensorReader;
    return *only;
}

}  // namespace agr::python
