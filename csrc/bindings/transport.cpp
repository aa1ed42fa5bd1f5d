// Checks, unwraps, forwards.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "transport/digest.h"
#include "transport/dlpack.h"
#include "transport/job.h"
#include "transport/receiver.h"
#include "transport/sender.h"

namespace py = pybind11;

namespace pipekern {
namespace {

// Above this, copying takes longer than giving the interpreter's lock back and taking it again.
constexpr std::uint64_t kLongCopy = 64 * 1024;

std::int64_t to_ns(double seconds) { return static_cast<std::int64_t>(seconds * 1e9); }

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

void drop_capsule(PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // its new owner calls the deleter
    auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    tensor->deleter(tensor);
}

py::object capsule_of(DLManagedTensor* tensor) {
    PyObject* capsule = PyCapsule_New(tensor, "dltensor", drop_capsule);
    if (!capsule) {
        tensor->deleter(tensor);
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(capsule);
}

bool send_pieces(Sender& sender, const Label& label, const std::vector<Piece>& pieces, std::uint64_t bytes) {
    if (bytes < kLongCopy) return sender.send(label, pieces.data(), pieces.size());
    const py::gil_scoped_release release;
    return sender.send(label, pieces.data(), pieces.size());
}

// True: sent. False: no free slot. None: the shape does not fit the header, send it as a bundle.
py::object send_tensor(Sender& sender, std::uint64_t tag, std::uintptr_t pointer, std::uint8_t dtype,
                       const py::tuple& shape, bool requires_grad, std::uint64_t digest) {
    Label label{tag, digest, dtype, static_cast<std::uint8_t>(shape.size()),
                requires_grad ? kRequiresGrad : std::uint8_t{0}};
    if (dtype >= kDtypeCount) throw py::value_error("no such dtype");
    if (shape.size() > kMaxDims) return py::none();
    std::uint64_t bytes = kDtypes[dtype].bits / 8;
    for (std::size_t i = 0; i < shape.size(); ++i) {
        const long long dim = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), static_cast<Py_ssize_t>(i)));
        if (dim < 0) throw py::value_error("a dimension is not a natural number");
        if (dim > UINT32_MAX) return py::none();
        label.shape[i] = static_cast<std::uint32_t>(dim);
        bytes *= static_cast<std::uint64_t>(dim);
    }
    const Piece piece{reinterpret_cast<const void*>(pointer), bytes};
    if (bytes < kLongCopy) return py::bool_(sender.send(label, &piece, 1));
    const py::gil_scoped_release release;
    const bool sent = sender.send(label, &piece, 1);
    const py::gil_scoped_acquire gil;
    return py::bool_(sent);
}

bool send_bundle(Sender& sender, std::uint64_t tag, const std::string& descriptor,
                 const std::vector<std::pair<std::uintptr_t, std::uint64_t>>& tensors, std::uint64_t digest) {
    Label label{tag, digest, 0, 0, kBundle};
    label.descriptor = static_cast<std::uint32_t>(descriptor.size());
    std::vector<Piece> pieces{{descriptor.data(), descriptor.size()}};
    std::uint64_t bytes = descriptor.size();
    for (const auto& [pointer, size] : tensors) {
        pieces.push_back({reinterpret_cast<const void*>(pointer), size});
        bytes += size;
    }
    return send_pieces(sender, label, pieces, bytes);
}

bool send_bytes(Sender& sender, std::uint64_t tag, const py::buffer& data) {
    const py::buffer_info info = data.request();
    const auto bytes = static_cast<std::uint64_t>(info.size * info.itemsize);
    if (bytes > UINT32_MAX) throw py::value_error("raw bytes of 4 GiB and more: send a tensor");
    Label label{tag, 0, 0, 1, 0};
    label.shape[0] = static_cast<std::uint32_t>(bytes);
    return send_pieces(sender, label, {{info.ptr, bytes}}, bytes);
}

std::shared_ptr<Arrival> receive(Receiver& receiver, std::uint64_t tag, double wait) {
    if (!receiver.ready() && !receiver.spin()) {
        const py::gil_scoped_release release;
        if (!receiver.wait(tag, wait < 0 ? -1 : to_ns(wait))) return nullptr;
    }
    return receiver.take(tag);
}

py::bytes descriptor_of(const Arrival& arrival) {
    return py::bytes(reinterpret_cast<const char*>(arrival.payload()), arrival.header().descriptor);
}

// None, or (capsule, dtype, requires_grad, digest), or for a bundle (arrival, -1, descriptor, digest).
py::object recv(Receiver& receiver, std::uint64_t tag, double wait) {
    auto arrival = receive(receiver, tag, wait);
    if (!arrival) return py::none();
    const Header& header = arrival->header();
    const std::uint64_t digest = header.digest;
    if (header.flags & kBundle) {
        py::bytes descriptor = descriptor_of(*arrival);
        return py::make_tuple(std::move(arrival), -1, std::move(descriptor), digest);
    }
    const int dtype = header.dtype;
    const bool requires_grad = header.flags & kRequiresGrad;
    return py::make_tuple(capsule_of(view_of(std::move(arrival))), dtype, requires_grad, digest);
}

py::object recv_bytes(Receiver& receiver, std::uint64_t tag, double wait) {
    const auto arrival = receive(receiver, tag, wait);
    if (!arrival) return py::none();
    return py::bytes(reinterpret_cast<const char*>(arrival->payload()), arrival->header().bytes);
}

// Of each message that is still held: a tensor's shape, or a bundle's descriptor.
py::list held(const Receiver& receiver) {
    py::list all;
    for (const auto& arrival : receiver.held()) {
        const Header& header = arrival->header();
        if (header.flags & kBundle)
            all.append(descriptor_of(*arrival));
        else
            all.append(py::tuple(py::cast(std::vector<std::uint32_t>(header.shape, header.shape + header.ndim))));
    }
    return all;
}

std::shared_ptr<Job> make_job(int rank, int world, const std::string& token, double timeout) {
    if (world < 1 || rank < 0 || rank >= world) throw py::value_error("rank must be in 0 … world - 1");
    if (!(timeout > 0)) throw py::value_error("timeout must be positive");
    return std::make_shared<Job>(rank, world, token, to_ns(timeout), std::make_unique<PythonObserver>());
}

template <class End>
std::shared_ptr<End> make_end(const std::shared_ptr<Job>& job, std::uint32_t number, const std::string& name, int peer,
                              std::uint64_t slots) {
    if (peer < 0 || peer >= job->world()) throw py::value_error("no such rank");
    if (slots < 1 || slots > 1 << 20) throw py::value_error("slots must be in 1 … 2^20");
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
            return capsule_of(view_of(arrival, offset, dtype, std::move(shape)));
        });
    py::class_<Receiver, std::shared_ptr<Receiver>>(m, "Receiver")
        .def(py::init(&make_end<Receiver>), "job"_a, "number"_a, "name"_a, "source"_a, "slots"_a, unlocked())
        .def("ready", &Receiver::ready)
        .def("recv", &recv)
        .def("recv_bytes", &recv_bytes)
        .def("held", &held)
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
