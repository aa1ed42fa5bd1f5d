// Checks, unwraps, forwards.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "bindings/messages.h"
#include "transport/digest.h"

namespace py = pybind11;

namespace pipekern {
namespace {

// Above this, copying takes longer than giving the interpreter's lock back and taking it again.
constexpr std::uint64_t kLongCopy = 64 * 1024;

struct PythonObserver : Observer {
    void slice() override {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    void note(const std::string& text) override {
        const py::gil_scoped_acquire gil;
        py::module_::import("logging").attr("getLogger")("pipekern").attr("warning")("%s", text);
    }
};

void translate(std::exception_ptr pointer) {
    try {
        std::rethrow_exception(pointer);
    } catch (const Failure& failure) {
        static constexpr const char* kNames[] = {"TransportError",   "Aborted",         "PeerDied",      "PeerFrozen",
                                                 "TransportTimeout", "MessageMismatch", "TransportError"};
        const py::object type =
            py::module_::import("pipekern.errors").attr(kNames[static_cast<std::uint32_t>(failure.kind())]);
        const py::bytes bytes(failure.what());  // a text that was cut may end within a letter
        PyErr_SetObject(type.ptr(), type(bytes.attr("decode")("utf-8", "replace"), failure.rank()).ptr());
    }
}

bool send_pieces(Sender& sender, const Label& label, const Piece* pieces, std::size_t count, std::uint64_t bytes) {
    if (bytes < kLongCopy) return sender.send(label, pieces, count);
    const py::gil_scoped_release release;
    return sender.send(label, pieces, count);
}

// True: sent. False: no free slot. None: not a tensor that goes as it stands under a header of its own.
py::object send_tensor(Sender& sender, std::uint64_t tag, const py::object& tensor, bool requires_grad,
                       std::uint64_t digest) {
    const auto plain = TorchTensors::get().plain(tensor);
    if (!plain || plain->device.device_type != kDlpackCpu) return py::none();
    const auto label = label_of(*plain, tag, requires_grad, digest);
    if (!label) return py::none();
    const Piece piece{plain->data, plain->bytes};
    return py::bool_(send_pieces(sender, *label, &piece, 1, plain->bytes));
}

bool send_bundle(Sender& sender, std::uint64_t tag, const std::string& descriptor,
                 const std::vector<std::pair<std::uintptr_t, std::uint64_t>>& tensors, std::uint64_t digest) {
    std::vector<Piece> pieces{{descriptor.data(), descriptor.size()}};
    std::uint64_t bytes = descriptor.size();
    for (const auto& [pointer, size] : tensors) {
        pieces.push_back({reinterpret_cast<const void*>(pointer), size});
        bytes += size;
    }
    return send_pieces(sender, bundle_label(tag, descriptor, digest), pieces.data(), pieces.size(), bytes);
}

bool send_bytes(Sender& sender, std::uint64_t tag, const py::buffer& data) {
    const py::buffer_info info = data.request();
    const auto bytes = static_cast<std::uint64_t>(info.size * info.itemsize);
    if (bytes > UINT32_MAX) throw py::value_error("raw bytes of 4 GiB and more: send a tensor");
    Label label{tag, 0, 0, 1, 0};
    label.shape[0] = static_cast<std::uint32_t>(bytes);
    const Piece piece{info.ptr, bytes};
    return send_pieces(sender, label, &piece, 1, bytes);
}

std::shared_ptr<Arrival> receive(Receiver& receiver, std::uint64_t tag, double wait) {
    return await(receiver, tag, wait) ? receiver.take(tag) : nullptr;
}

// None, or a Message of a tensor, or for a bundle the tuple (arrival, descriptor, digest).
py::object recv(Receiver& receiver, std::uint64_t tag, double wait) {
    auto arrival = receive(receiver, tag, wait);
    return arrival ? received(std::move(arrival)) : py::none();
}

py::object recv_bytes(Receiver& receiver, std::uint64_t tag, double wait) {
    const auto arrival = receive(receiver, tag, wait);
    if (!arrival) return py::none();
    return py::bytes(reinterpret_cast<const char*>(arrival->payload()), arrival->header().bytes);
}

std::shared_ptr<Job> make_job(int rank, int world, const std::string& token, double timeout) {
    if (world < 1 || rank < 0 || rank >= world) throw py::value_error("rank must be in 0 … world - 1");
    if (!(timeout > 0)) throw py::value_error("timeout must be positive");
    return std::make_shared<Job>(rank, world, token, to_ns(timeout), std::make_unique<PythonObserver>());
}

template <class End>
std::shared_ptr<End> make_end(const std::shared_ptr<Job>& job, std::uint32_t number, const std::string& name, int peer,
                              std::uint64_t slots) {
    check_link(*job, peer, slots);
    return std::make_shared<End>(job, LinkName{number, name, slots}, peer);
}

void bind_ends(py::module_& m) {
    using unlocked = py::call_guard<py::gil_scoped_release>;
    using namespace py::literals;
    py::class_<Sender, std::shared_ptr<Sender>>(m, "Sender")
        .def(py::init(&make_end<Sender>), "job"_a, "number"_a, "name"_a, "target"_a, "slots"_a, unlocked())
        .def("free", &Sender::free)
        .def("send_tensor", &send_tensor)
        .def("send_bundle", &send_bundle)
        .def("send_bytes", &send_bytes);
    py::class_<Arrival, std::shared_ptr<Arrival>>(m, "Arrival")
        .def("view", [](const std::shared_ptr<Arrival>& arrival, std::uint64_t offset, std::uint8_t dtype,
                        std::vector<std::int64_t> shape) {
            return TorchTensors::get().over(view_of(arrival, offset, dtype, std::move(shape)));
        });
    py::class_<Receiver, std::shared_ptr<Receiver>>(m, "Receiver")
        .def(py::init(&make_end<Receiver>), "job"_a, "number"_a, "name"_a, "source"_a, "slots"_a, unlocked())
        .def("ready", &Receiver::ready)
        .def("recv", &recv)
        .def("recv_bytes", &recv_bytes)
        .def("held", [](const Receiver& receiver) { return shapes_of(receiver.held()); })
        .def("owns", [](const Receiver& receiver, std::uintptr_t pointer) {
            return receiver.owns(reinterpret_cast<const void*>(pointer));
        });
}

}  // namespace

void bind_transport(py::module_& m) {
    using unlocked = py::call_guard<py::gil_scoped_release>;
    using namespace py::literals;
    py::register_local_exception_translator(translate);
    py::class_<Job, std::shared_ptr<Job>>(m, "Job")
        .def(py::init(&make_job), "rank"_a, "world"_a, "token"_a, "timeout"_a)
        .def("connect", &Job::connect, unlocked())
        .def("check", &Job::check)
        .def("abort", &Job::abort, "text"_a, unlocked())
        .def("close", &Job::close, unlocked());
    bind_ends(m);
    m.def(
        "digest",
        [](std::uintptr_t pointer, std::uint64_t bytes, std::uint64_t seed) {
            const py::gil_scoped_release release;
            return digest(reinterpret_cast<const void*>(pointer), bytes, seed);
        },
        "pointer"_a, "bytes"_a, "seed"_a);
}

}  // namespace pipekern
