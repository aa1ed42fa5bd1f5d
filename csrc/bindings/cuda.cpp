// Checks, unwraps, forwards: links between CUDA devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "bindings/messages.h"
#include "cuda/receiver.h"
#include "cuda/sender.h"

namespace py = pybind11;

namespace pipekern {
namespace {

using namespace cuda;
using unlocked = py::call_guard<py::gil_scoped_release>;

// A receiving end, and the device that torch calls its memory by.
struct TorchReceiver {
    std::shared_ptr<DeviceReceiver> end;
    DLDevice device;
};

// A bundle in its slot.
struct DeviceBundle {
    Delivery delivery;
    DLDevice device;

    Span span() const { return {reinterpret_cast<void*>(delivery.base), limit(), device}; }
    std::uint64_t limit() const { return delivery.landed ? delivery.parcel.landing_bytes : delivery.parcel.bytes; }
};

StreamHandle stream_of(std::uintptr_t stream) { return reinterpret_cast<StreamHandle>(stream); }

DeviceTensor device_tensor(const PlainTensor& tensor) {
    return {reinterpret_cast<Pointer>(tensor.data), tensor.bytes * 8 / kDtypes[tensor.dtype].bits, tensor.dtype};
}

// True: sent. False: no free slot. None: not a tensor that goes as it stands under a header of its own.
py::object send_tensor(DeviceSender& sender, std::uint64_t tag, const py::object& tensor, bool requires_grad,
                       std::uint64_t digest, std::uintptr_t stream, bool given) {
    const auto plain = TorchTensors::get().plain(tensor);
    const auto label = plain ? label_of(*plain, tag, requires_grad, digest) : std::nullopt;
    if (!label) return py::none();
    const DeviceTensor own = device_tensor(*plain);
    bool sent;
    {
        const py::gil_scoped_release release;
        sent = sender.send(*label, {}, {own}, stream_of(stream), given);
    }
    return py::bool_(sent);
}

bool send_bundle(DeviceSender& sender, std::uint64_t tag, const std::string& descriptor,
                 const std::vector<std::pair<std::uintptr_t, std::uint64_t>>& on_host, const py::list& on_device,
                 std::uint64_t digest, std::uintptr_t stream, bool given) {
    std::vector<DeviceTensor> tensors;
    std::vector<std::uint64_t> table{on_device.size()};
    for (const py::handle tensor : on_device) {
        const auto plain = TorchTensors::get().plain(tensor);
        if (!plain) throw py::value_error("a tensor of a bundle is not contiguous");
        tensors.push_back(device_tensor(*plain));
        table.insert(table.end(), {plain->dtype, tensors.back().elements});
    }
    std::vector<Piece> pieces{{descriptor.data(), descriptor.size()}};
    if (!tensors.empty()) pieces.push_back({table.data(), 8 * table.size()});
    for (const auto& [pointer, bytes] : on_host) pieces.push_back({reinterpret_cast<const void*>(pointer), bytes});
    const py::gil_scoped_release release;
    return sender.send(bundle_label(tag, descriptor, digest), std::move(pieces), tensors, stream_of(stream), given);
}

py::object tensor_of(const TorchReceiver& receiver, Delivery delivery) {
    const Header& header = delivery.arrival->header();
    if (!(header.flags & kDevice)) return TorchTensors::get().over(view_of(std::move(delivery.arrival)));
    const std::vector<std::int64_t> shape(header.shape, header.shape + header.ndim);
    const std::uint8_t dtype = header.dtype;
    auto bundle = std::make_shared<DeviceBundle>(DeviceBundle{std::move(delivery), receiver.device});
    const Span span = bundle->span();
    const std::uint64_t offset = bundle->delivery.offset(0);
    return TorchTensors::get().over(view_of(std::move(bundle), span, offset, dtype, shape));
}

// None, or a Message of a tensor, or for a bundle the tuple (bundle, descriptor, digest).
py::object recv(TorchReceiver& receiver, std::uint64_t tag, double wait, std::uintptr_t stream) {
    if (!await(*receiver.end, tag, wait)) return py::none();
    Delivery delivery;
    {
        const py::gil_scoped_release release;
        delivery = receiver.end->take(tag, stream_of(stream));
    }
    const Header& header = delivery.arrival->header();
    const std::uint64_t digest = header.digest;
    if (header.flags & kBundle) {
        py::bytes descriptor = descriptor_of(*delivery.arrival);
        auto bundle = std::make_shared<DeviceBundle>(DeviceBundle{std::move(delivery), receiver.device});
        return py::make_tuple(std::move(bundle), std::move(descriptor), digest);
    }
    const bool requires_grad = header.flags & kRequiresGrad;
    py::object tensor = tensor_of(receiver, std::move(delivery));
    if (requires_grad) tensor.attr("requires_grad") = true;
    return message_of(std::move(tensor), digest);
}

// None, or the Message of `tensor` itself, to which the next one was added; or False for one that cannot be, and is
// left.
py::object recv_into(TorchReceiver& receiver, std::uint64_t tag, const py::object& tensor, double wait,
                     std::uintptr_t stream) {
    if (!await(*receiver.end, tag, wait)) return py::none();
    const auto plain = TorchTensors::get().plain(tensor);
    if (!plain) return py::bool_(false);
    const DeviceTensor into = device_tensor(*plain);
    bool added;
    {
        const py::gil_scoped_release release;
        added = receiver.end->take_into(tag, stream_of(stream), into);
    }
    return added ? message_of(tensor, 0) : py::bool_(false);
}

// The tensor `index` of those that travelled through device memory.
py::object view_device(const std::shared_ptr<DeviceBundle>& bundle, std::size_t index, std::uint8_t dtype,
                       std::vector<std::int64_t> shape) {
    const auto& parts = bundle->delivery.parcel.parts;
    std::uint64_t elements = 1;
    for (const std::int64_t dim : shape) elements *= static_cast<std::uint64_t>(dim);
    if (index >= parts.size() || parts[index].dtype != dtype || parts[index].elements != elements)
        throw Failure(Fault::kTransport, -1, "a message announces another tensor than it brings");
    return TorchTensors::get().over(
        view_of(bundle, bundle->span(), bundle->delivery.offset(index), dtype, std::move(shape)));
}

// The tensor at `offset` behind the descriptor and the table of the others.
py::object view_host(const std::shared_ptr<DeviceBundle>& bundle, std::uint64_t offset, std::uint8_t dtype,
                     std::vector<std::int64_t> shape) {
    return TorchTensors::get().over(view_of(bundle->delivery.arrival, offset, dtype, std::move(shape)));
}

std::uint64_t host_start(const DeviceBundle& bundle) {
    const std::size_t table = align_up(bundle.delivery.arrival->header().descriptor);
    const std::size_t parts = bundle.delivery.parcel.parts.size();
    return parts ? align_up(table + 8 + 16 * parts) : table;
}

std::shared_ptr<DeviceSender> make_sender(const std::shared_ptr<Job>& job, const std::shared_ptr<Steward>& steward,
                                          std::uint32_t number, const std::string& name, int target,
                                          std::uint64_t slots, Codec codec, const std::shared_ptr<Context>& context,
                                          bool wait_on_host) {
    check_link(*job, target, slots);
    return std::make_shared<DeviceSender>(job, steward, LinkName{number, name, slots}, target, codec, context,
                                          wait_on_host);
}

TorchReceiver make_receiver(const std::shared_ptr<Job>& job, const std::shared_ptr<Steward>& steward,
                            std::uint32_t number, const std::string& name, int source, std::uint64_t slots, Codec codec,
                            const std::shared_ptr<Context>& context, bool wait_on_host, std::pair<int, int> device) {
    check_link(*job, source, slots);
    return {std::make_shared<DeviceReceiver>(job, steward, LinkName{number, name, slots}, source, codec, context,
                                             wait_on_host),
            {device.first, device.second}};
}

std::string peer_obstacle(int device, int peer) { return Context(device).reach(Context(peer)); }

py::dict describe_driver() {
    const Driver& driver = Driver::get();
    int version = 0, count = 0;
    demand(driver.driver_version(&version), "the driver's version");
    demand(driver.device_count(&count), "counting devices");
    py::list devices;
    for (int device = 0; device < count; ++device) {
        char name[256] = {};
        demand(driver.device_name(name, sizeof name - 1, device_handle(device)), "a device's name");
        devices.append(py::make_tuple(py::str(name), device_attribute(kStreamMemoryOps64, device) != 0));
    }
    py::dict all;
    all["version"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    all["devices"] = devices;
    return all;
}

void bind_ends(py::module_& m) {
    using namespace py::literals;
    py::class_<DeviceSender, std::shared_ptr<DeviceSender>>(m, "DeviceSender")
        .def(py::init(&make_sender), "job"_a, "steward"_a, "number"_a, "name"_a, "target"_a, "slots"_a, "codec"_a,
             "context"_a, "wait_on_host"_a, unlocked())
        .def("free", &DeviceSender::free)
        .def("send_tensor", &send_tensor)
        .def("send_bundle", &send_bundle)
        .def("reap", &DeviceSender::reap, unlocked())
        .def("way", &DeviceSender::way)
        .def("close", &DeviceSender::close, unlocked());
    py::class_<DeviceBundle, std::shared_ptr<DeviceBundle>>(m, "DeviceBundle")
        .def_property_readonly("host_start", &host_start)
        .def("view_device", &view_device)
        .def("view_host", &view_host);
    py::class_<TorchReceiver>(m, "DeviceReceiver")
        .def(py::init(&make_receiver), "job"_a, "steward"_a, "number"_a, "name"_a, "source"_a, "slots"_a, "codec"_a,
             "context"_a, "wait_on_host"_a, "device"_a, unlocked())
        .def("announced", [](const TorchReceiver& receiver) { return receiver.end->announced(); })
        .def("ready", [](const TorchReceiver& receiver) { return receiver.end->ready(); })
        .def("recv", &recv)
        .def("recv_into", &recv_into)
        .def(
            "drain",
            [](const TorchReceiver& receiver, std::uintptr_t stream) { receiver.end->drain(stream_of(stream)); },
            unlocked())
        .def("held", [](const TorchReceiver& receiver) { return shapes_of(receiver.end->held()); })
        .def("owns", [](const TorchReceiver& receiver, std::uintptr_t place) { return receiver.end->owns(place); })
        .def("close", [](const TorchReceiver& receiver) { receiver.end->close(); }, unlocked());
}

}  // namespace

void bind_cuda(py::module_& m) {
    using namespace py::literals;
    py::enum_<Codec>(m, "Codec").value("NONE", Codec::kNone).value("BF16", Codec::kBf16).value("FP8", Codec::kFp8);
    py::class_<Context, std::shared_ptr<Context>>(m, "Context").def(py::init<int>(), "device"_a);
    py::class_<Steward, std::shared_ptr<Steward>>(m, "Steward").def(py::init<std::shared_ptr<Job>>(), "job"_a);
    bind_ends(m);
    m.def("cuda_obstacle", &Driver::obstacle);
    m.def("cuda_driver", &describe_driver);
    m.def("cuda_kernels", &Kernels::origin);
    m.def("peer_obstacle", &peer_obstacle, "device"_a, "peer"_a);
}

}  // namespace pipekern
