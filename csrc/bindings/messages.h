// What the bindings of all transports share: messages between torch and the ends of links.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/torch_tensors.h"
#include "transport/receiver.h"
#include "transport/sender.h"

namespace pipekern {

inline std::int64_t to_ns(double seconds) { return static_cast<std::int64_t>(seconds * 1e9); }

// A tensor's header; nothing where its shape does not fit one.
std::optional<Label> label_of(const PlainTensor& tensor, std::uint64_t tag, bool requires_grad, std::uint64_t digest);

Label bundle_label(std::uint64_t tag, const std::string& descriptor, std::uint64_t digest);

// Whether the next message is there, at the latest after `wait` seconds (negative: no limit).
template <class End>
bool await(End& receiver, std::uint64_t tag, double wait) {
    if (receiver.ready() || receiver.spin()) return true;
    const pybind11::gil_scoped_release release;
    return receiver.wait(tag, wait < 0 ? -1 : to_ns(wait));
}

pybind11::bytes descriptor_of(const Arrival& arrival);

// base.py's Message, made as its own constructor does.
pybind11::object message_of(pybind11::object value, std::uint64_t digest);

// Of one that lies in host memory: a Message of a tensor, or for a bundle the tuple (arrival, descriptor, digest).
pybind11::object received(std::shared_ptr<Arrival> arrival);

// Of a message that is still held: a tensor's shape, or a bundle's descriptor.
pybind11::object shape_of(const Arrival& arrival);
pybind11::list shapes_of(const std::vector<std::shared_ptr<const Arrival>>& held);

// Raises ValueError for a link that cannot be.
void check_link(const Job& job, int peer, std::uint64_t slots);

}  // namespace pipekern
