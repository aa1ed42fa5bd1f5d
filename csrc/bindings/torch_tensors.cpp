#include "bindings/torch_tensors.h"

#include "transport/header.h"

namespace py = pybind11;

namespace pipekern {

// DLPack's DLPackExchangeAPI; of its functions, only these two are called.
struct TorchTensors::Table {
    DLPackVersion version;
    const void* older;
    void (*allocate)();
    void (*managed_from_object)();
    int (*managed_to_object)(DLManagedTensorVersioned* managed, void** object);
    int (*tensor_from_object)(void* object, DLTensor* tensor);
    void (*current_stream)();
};

namespace {

std::optional<std::uint8_t> place_of(DLDataType dtype) {
    for (std::size_t place = 0; place < kDtypeCount; ++place)
        if (kDtypes[place].code == dtype.code && kDtypes[place].bits == dtype.bits && dtype.lanes == 1)
            return static_cast<std::uint8_t>(place);
    return std::nullopt;
}

bool contiguous(const DLTensor& tensor, std::uint64_t elements) {
    std::int64_t step = 1;
    for (std::int32_t i = tensor.ndim; elements > 1 && i-- > 0;) {
        if (tensor.shape[i] != 1 && tensor.strides[i] != step) return false;
        step *= tensor.shape[i];
    }
    return true;
}

// What the bit says of a view whose values are those of its memory changed (conjugated or negated).
bool says(py::handle tensor, PyObject* method) {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
}

}  // namespace

const TorchTensors& TorchTensors::get() {
    static const TorchTensors* tensors = nullptr;  // never freed: the interpreter may be gone before it is
    if (!tensors) tensors = new TorchTensors();
    return *tensors;
}

TorchTensors::TorchTensors() {
    const py::module_ torch = py::module_::import("torch");
    const py::object tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    table_ = static_cast<const Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!table_ || table_->version.major != kDlpackMajor) {
        PyErr_Clear();
        throw py::import_error(
            "this torch has no DLPack exchange table of version 1; pipekern needs torch 2.10 or later");
    }
    tensor_ = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
    parameter_ = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
    is_conj_ = PyUnicode_InternFromString("is_conj");
    is_neg_ = PyUnicode_InternFromString("is_neg");
}

std::optional<PlainTensor> TorchTensors::plain(py::handle object) const {
    if (Py_TYPE(object.ptr()) != tensor_ && Py_TYPE(object.ptr()) != parameter_) return std::nullopt;
    DLTensor tensor;
    if (table_->tensor_from_object(object.ptr(), &tensor) != 0) {  // sparse, quantized, meta
        PyErr_Clear();
        return std::nullopt;
    }
    const auto place = place_of(tensor.dtype);
    if (!place) return std::nullopt;
    std::uint64_t elements = 1;
    for (std::int32_t i = 0; i < tensor.ndim; ++i) elements *= static_cast<std::uint64_t>(tensor.shape[i]);
    const bool has_data = tensor.data || elements == 0;  // a tensor known to be zero may have none
    if (!has_data || !contiguous(tensor, elements)) return std::nullopt;
    if (says(object, is_neg_) || (tensor.dtype.code == kComplex && says(object, is_conj_))) return std::nullopt;
    const std::byte* data = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
    return PlainTensor{data, elements * kDtypes[*place].bits / 8, tensor.ndim, tensor.shape, *place, tensor.device};
}

py::object TorchTensors::over(DLManagedTensorVersioned* managed) const {
    void* object = nullptr;
    if (table_->managed_to_object(managed, &object) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

}  // namespace pipekern
