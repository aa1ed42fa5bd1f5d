#include "bindings/messages.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace pipekern {

std::optional<Label> label_of(const PlainTensor& tensor, std::uint64_t tag, bool requires_grad, std::uint64_t digest) {
    if (tensor.ndim > static_cast<std::int32_t>(kMaxDims)) return std::nullopt;
    Label label{tag, digest, tensor.dtype, static_cast<std::uint8_t>(tensor.ndim),
                requires_grad ? kRequiresGrad : std::uint8_t{0}};
    for (std::int32_t i = 0; i < tensor.ndim; ++i) {
        if (tensor.shape[i] > UINT32_MAX) return std::nullopt;
        label.shape[i] = static_cast<std::uint32_t>(tensor.shape[i]);
    }
    return label;
}

Label bundle_label(std::uint64_t tag, const std::string& descriptor, std::uint64_t digest) {
    Label label{tag, digest, 0, 0, kBundle};
    label.descriptor = static_cast<std::uint32_t>(descriptor.size());
    return label;
}

void check_link(const Job& job, int peer, std::uint64_t slots) {
    if (peer < 0 || peer >= job.world()) throw py::value_error("no such rank");
    if (slots < 1 || slots > 1 << 20) throw py::value_error("slots must be in 1 … 2^20");
}

py::bytes descriptor_of(const Arrival& arrival) {
    return py::bytes(reinterpret_cast<const char*>(arrival.payload()), arrival.header().descriptor);
}

py::object message_of(py::object value, std::uint64_t digest) {
    static auto* type = reinterpret_cast<PyTypeObject*>(
        py::object(py::module_::import("pipekern.transport.base").attr("Message")).release().ptr());
    const auto message = py::reinterpret_steal<py::object>(type->tp_alloc(type, 2));
    if (!message) throw py::error_already_set();
    PyTuple_SET_ITEM(message.ptr(), 0, value.release().ptr());
    PyTuple_SET_ITEM(message.ptr(), 1, py::int_(digest).release().ptr());
    return message;
}

py::object received(std::shared_ptr<Arrival> arrival) {
    const Header& header = arrival->header();
    const std::uint64_t digest = header.digest;
    if (header.flags & kBundle) {
        py::bytes descriptor = descriptor_of(*arrival);
        return py::make_tuple(std::move(arrival), std::move(descriptor), digest);
    }
    const bool requires_grad = header.flags & kRequiresGrad;
    py::object tensor = TorchTensors::get().over(view_of(std::move(arrival)));
    if (requires_grad) tensor.attr("requires_grad") = true;
    return message_of(std::move(tensor), digest);
}

py::list shapes_of(const std::vector<std::shared_ptr<const Arrival>>& held) {
    py::list all;
    for (const auto& arrival : held) all.append(shape_of(*arrival));
    return all;
}

py::object shape_of(const Arrival& arrival) {
    const Header& header = arrival.header();
    if (header.flags & kBundle) return descriptor_of(arrival);
    return py::tuple(py::cast(std::vector<std::uint32_t>(header.shape, header.shape + header.ndim)));
}

}  // namespace pipekern
