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

// As of any link through shared memory.
py::object recv(StagedReceiver& receiver, std::uint64_t tag, double wait, std::uintptr_t stream) {
    if (!await(receiver, tag, wait)) return py::none();
    std::shared_ptr<Arrival> arrival;
    {
        const py::gil_scoped_release release;
        arrival = receiver.take(tag, stream_of(stream));
    }
    return received(std::move(arrival));
}

template <class End>
std::shared_ptr<End> make_end(const std::shared_ptr<Job>& job, std::uint32_t number, const std::string& name, int peer,
                              std::uint64_t slots, const std::shared_ptr<Context>& context) {
    check_link(*job, peer, slots);
    return std::make_shared<End>(job, LinkName{number, name, slots}, peer, context);
}

}  // namespace

void bind_staged(py::module_& m) {
    using namespace py::literals;
    py::class_<StagedSender, std::shared_ptr<StagedSender>>(m, "StagedSender")
        .def(py::init(&make_end<StagedSender>), "job"_a, "number"_a, "name"_a, "target"_a, "slots"_a, "context"_a,
             unlocked())
        .def("free", &StagedSender::free)
        .def("send_tensor", &send_tensor)
        .def("send_bundle", &send_bundle)
        .def("reap", &StagedSender::reap, unlocked())
        .def("close", &StagedSender::close, unlocked());
    py::class_<StagedReceiver, std::shared_ptr<StagedReceiver>>(m, "StagedReceiver")
        .def(py::init(&make_end<StagedReceiver>), "job"_a, "number"_a, "name"_a, "source"_a, "slots"_a, "context"_a,
             unlocked())
        .def("ready", &StagedReceiver::ready)
        .def("recv", &recv)
        .def("held", [](const StagedReceiver& receiver) { return shapes_of(receiver.held()); })
        .def("owns", [](const StagedReceiver& receiver,
                        std::uintptr_t place) { return receiver.owns(reinterpret_cast<const void*>(place)); })
        .def("close", &StagedReceiver::close, unlocked());
}

}  // namespace pipekern
