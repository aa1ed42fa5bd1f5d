// Checks, unwraps, forwards: links between a CUDA device and a rank on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "bindings/messages.h"
#include "cuda/staged_receiver.h"
#include "cuda/staged_sender.h"

namespace py = pybind11;

namespace pipekern {
namespace {

using namespace cuda;
using unlocked = py::call_guard<py::gil_scoped_release>;

// A receiving end, and the device that torch calls its memory by.
struct TorchStagedReceiver {
    std::shared_ptr<StagedReceiver> end;
    DLDevice device;
};

// A bundle on the device.
struct StagedBundle {
    std::shared_ptr<const Landed> landed;
    DLDevice device;
};

StreamHandle stream_of(std::uintptr_t stream) { return reinterpret_cast<StreamHandle>(stream); }

// True: sent. False: no free slot. None: not a tensor that goes as it stands under a header of its own.
py::object send_tensor(StagedSender& sender, std::uint64_t tag, const py::object& tensor, bool requires_grad,
                       std::uint64_t digest, std::uintptr_t stream, bool given) {
    const auto plain = TorchTensors::get().plain(tensor);
    const auto label = plain ? label_of(*plain, tag, requires_grad, digest) : std::nullopt;
    if (!label) return py::none();
    bool sent;
    {
        const py::gil_scoped_release release;
        sent = sender.send(*label, {{nullptr, plain->bytes}}, {reinterpret_cast<Pointer>(plain->data)},
                           stream_of(stream), given);
    }
    return py::bool_(sent);
}

// `tensors`: address, bytes, and whether it is on the device.
bool send_bundle(StagedSender& sender, std::uint64_t tag, const std::string& descriptor,
                 const std::vector<std::tuple<std::uintptr_t, std::uint64_t, bool>>& tensors, std::uint64_t digest,
                 std::uintptr_t stream, bool given) {
    std::vector<Piece> pieces{{descriptor.data(), descriptor.size()}};
    std::vector<Pointer> on_device;
    for (const auto& [address, bytes, here] : tensors) {
        pieces.push_back({here ? nullptr : reinterpret_cast<const void*>(address), bytes});
        if (here) on_device.push_back(address);
    }
    const py::gil_scoped_release release;
    return sender.send(bundle_label(tag, descriptor, digest), pieces, on_device, stream_of(stream), given);
}

py::object view(const std::shared_ptr<const Landed>& landed, DLDevice device, std::uint64_t offset, std::uint8_t dtype,
                std::vector<std::int64_t> shape) {
    const Span span{reinterpret_cast<void*>(landed->base), landed->arrival->header().bytes, device};
    return TorchTensors::get().over(view_of(landed, span, offset, dtype, std::move(shape)));
}

// None, or a Message of a tensor, or for a bundle the tuple (bundle, descriptor, digest).
py::object recv(TorchStagedReceiver& receiver, std::uint64_t tag, double wait, std::uintptr_t stream) {
    if (!await(*receiver.end, tag, wait)) return py::none();
    std::shared_ptr<const Landed> landed;
    {
        const py::gil_scoped_release release;
        landed = receiver.end->take(tag, stream_of(stream));
    }
    const Header& header = landed->arrival->header();
    const std::uint64_t digest = header.digest;
    if (header.flags & kBundle) {
        py::bytes descriptor = descriptor_of(*landed->arrival);
        return py::make_tuple(StagedBundle{std::move(landed), receiver.device}, std::move(descriptor), digest);
    }
    py::object tensor = view(landed, receiver.device, 0, header.dtype, {header.shape, header.shape + header.ndim});
    if (header.flags & kRequiresGrad) tensor.attr("requires_grad") = true;
    return message_of(std::move(tensor), digest);
}

std::shared_ptr<StagedSender> make_sender(const std::shared_ptr<Job>& job, std::uint32_t number,
                                          const std::string& name, int target, std::uint64_t slots,
                                          const std::shared_ptr<Context>& context) {
    check_link(*job, target, slots);
    return std::make_shared<StagedSender>(job, LinkName{number, name, slots}, target, context);
}

TorchStagedReceiver make_receiver(const std::shared_ptr<Job>& job, std::uint32_t number, const std::string& name,
                                  int source, std::uint64_t slots, const std::shared_ptr<Context>& context,
                                  std::pair<int, int> device) {
    check_link(*job, source, slots);
    return {std::make_shared<StagedReceiver>(job, LinkName{number, name, slots}, source, context),
            {device.first, device.second}};
}

py::list held(const TorchStagedReceiver& receiver) {
    py::list all;
    for (const auto& landed : receiver.end->held()) all.append(shape_of(*landed->arrival));
    return all;
}

}  // namespace

void bind_staged(py::module_& m) {
    using namespace py::literals;
    py::class_<StagedSender, std::shared_ptr<StagedSender>>(m, "StagedSender")
        .def(py::init(&make_sender), "job"_a, "number"_a, "name"_a, "target"_a, "slots"_a, "context"_a, unlocked())
        .def("free", &StagedSender::free)
        .def("send_tensor", &send_tensor)
        .def("send_bundle", &send_bundle)
        .def("reap", &StagedSender::reap, unlocked())
        .def("close", &StagedSender::close, unlocked());
    py::class_<StagedBundle>(m, "StagedBundle")
        .def("view",
             [](const StagedBundle& bundle, std::uint64_t offset, std::uint8_t dtype, std::vector<std::int64_t> shape) {
                 return view(bundle.landed, bundle.device, offset, dtype, std::move(shape));
             });
    py::class_<TorchStagedReceiver>(m, "StagedReceiver")
        .def(py::init(&make_receiver), "job"_a, "number"_a, "name"_a, "source"_a, "slots"_a, "context"_a, "device"_a,
             unlocked())
        .def("ready", [](const TorchStagedReceiver& receiver) { return receiver.end->ready(); })
        .def("recv", &recv)
        .def("held", &held)
        .def("owns",
             [](const TorchStagedReceiver& receiver, std::uintptr_t place) { return receiver.end->owns(place); })
        .def("close", [](const TorchStagedReceiver& receiver) { receiver.end->close(); }, unlocked());
}

}  // namespace pipekern
