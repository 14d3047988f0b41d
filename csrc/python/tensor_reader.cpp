#include "tensor_reader.h"

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace agr::python {

// The part of DLPack's binary interface, version 1.3, that is used here.
struct DLTensor {
    void* data;
    struct {
        std::int32_t type, index;
    } device;
    std::int32_t dimensions;
    struct {
        std::uint8_t code, bits;
        std::uint16_t lanes;
    } dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

namespace {

struct ExchangeAPI {
    std::uint32_t major_version, minor_version;
    ExchangeAPI* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_object;
    void* managed_tensor_to_object;
    int (*tensor_from_object)(void* object, DLTensor* out);
    void* current_work_stream;
};

std::optional<Type> type_of(std::uint8_t code, std::uint8_t bits, std::uint16_t lanes) {
    constexpr std::uint8_t floating = 2, bfloat = 4;
    if (lanes != 1) return std::nullopt;
    if (code == floating && bits == 32) return Type::float32;
    if (code == floating && bits == 64) return Type::float64;
    if (code == floating && bits == 16) return Type::float16;
    if (code == bfloat && bits == 16) return Type::bfloat16;
    return std::nullopt;
}

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
    struct {
        py::object object;
        Type type;
    } types[4] = {{torch.attr("float32"), Type::float32},
                  {torch.attr("bfloat16"), Type::bfloat16},
                  {torch.attr("float16"), Type::float16},
                  {torch.attr("float64"), Type::float64}};
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
    if (name == "torch.float32") return Type::float32;
    if (name == "torch.bfloat16") return Type::bfloat16;
    if (name == "torch.float16") return Type::float16;
    if (name == "torch.float64") return Type::float64;
    throw std::invalid_argument("no kernel takes " + name);
}

std::int64_t TensorView::elements() const {
    std::int64_t product = 1;
    for (std::int32_t i = 0; i < dimensions; ++i) product *= shape[i];
    return product;
}

TensorReader::TensorReader() { use_exchange_api(true); }

void TensorReader::use_exchange_api(bool wanted) {
    ExchangeAPI* api = wanted ? find_exchange_api() : nullptr;
    describe_ = api != nullptr ? api->tensor_from_object : nullptr;
}

bool TensorReader::read(PyObject* tensor, TensorView& view) {
    const bool described = describe_ != nullptr ? read_through_api(tensor, view) : read_through_methods(tensor, view);
    if (!described) PyErr_Clear();
    // Wrappers around other tensors, and tensors whose storage was taken away, have elements and no memory.
    return described && (view.data != nullptr || view.elements() == 0);
}

bool TensorReader::read_through_api(PyObject* tensor, TensorView& view) const {
    DLTensor described;
    if (describe_(tensor, &described) != 0) return false;
    view = {static_cast<char*>(described.data) + described.byte_offset,
            described.device.type,
            described.device.index,
            type_of(described.dtype.code, described.dtype.bits, described.dtype.lanes),
            described.dimensions,
            described.shape,
            described.strides};
    return true;
}

TensorView TensorReader::read_or_throw(py::handle tensor, const char* role) {
    TensorView view;
    if (!read(tensor.ptr(), view))
        throw std::runtime_error(std::string("the ") + role + " " + std::string(py::str(py::type::of(tensor))) +
                                 " is no dense tensor in memory");
    return view;
}

bool TensorReader::read_through_methods(PyObject* tensor, TensorView& view) {
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

    view.data = PyLong_AsVoidPtr(address.ptr());
    view.type = std::nullopt;
    for (const auto& known : n.types)
        if (dtype.is(known.object)) view.type = known.type;
    const char* device_name = PyUnicode_AsUTF8(device_type.ptr());
    if (device_name == nullptr) return false;
    const std::string where = device_name;
    view.device_type = where == "cpu" ? cpu_device : where == "cuda" ? cuda_device : other_device;
    view.device_index = device_index.is_none() ? 0 : static_cast<std::int32_t>(PyLong_AsLong(device_index.ptr()));
    view.dimensions = static_cast<std::int32_t>(PyTuple_GET_SIZE(shape.ptr()));
    buffer_.clear();
    for (PyObject* tuple : {shape.ptr(), strides.ptr()})
        for (std::int32_t i = 0; i < view.dimensions; ++i)
            buffer_.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
    view.shape = buffer_.data();
    view.strides = buffer_.data() + view.dimensions;
    return PyErr_Occurred() == nullptr;
}

TensorReader& reader() {
    static TensorReader* only = new TensorReader;
    return *only;
}

}  // namespace agr::python
