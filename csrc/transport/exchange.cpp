#include "transport/exchange.h"

#include <poll.h>

#include <string>

#include "transport/error.h"

namespace pipekern {

bool Exchange::pass(int peer, const Frame& frame, const std::shared_ptr<Memory>& memory) {
    if (peer != rank_) return send_frame(peers_[static_cast<std::size_t>(peer)].socket, frame, memory->fd());
    const std::lock_guard lock(mutex_);
    arrived_[{peer, frame.kind, frame.number, frame.generation}] = memory;
    return true;
}

std::shared_ptr<Memory> Exchange::take(int peer, Frame::Kind kind, std::uint32_t number, std::uint32_t generation) {
    const std::lock_guard lock(mutex_);
    const Key key{peer, kind, number, generation};
    if (peer != rank_ && arrived_.count(key) == 0) drain(peer);
    const auto found = arrived_.find(key);
    if (found == arrived_.end()) return nullptr;
    auto memory = std::move(found->second);
    arrived_.erase(found);
    return memory;
}

void Exchange::absorb(int peer) {
    const std::lock_guard lock(mutex_);
    drain(peer);
}

void Exchange::wait(int peer, std::int64_t limit_ns) const {
    poll_socket(peers_[static_cast<std::size_t>(peer)].socket, POLLIN, limit_ns);
}

void Exchange::drain(int peer) {
    Frame frame{};
    Fd fd;
    while (receive_frame(peers_[static_cast<std::size_t>(peer)].socket, frame, fd) == Received::kFrame) {
        if (!fd)
            throw Failure(Fault::kTransport, peer,
                          "a shared memory of rank " + std::to_string(peer) +
                              " came without its descriptor: this process has no free ones, raise `ulimit -n`");
        const Key key{peer, frame.kind, frame.number, frame.generation};
        arrived_[key] = Memory::map(std::move(fd), frame.bytes);
    }
}

}  // namespace pipekern
