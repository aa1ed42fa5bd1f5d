#include "transport/mesh.h"

#include <poll.h>
#include <unistd.h>

#include "transport/clock.h"
#include "transport/error.h"
#include "transport/fork.h"
#include "transport/header.h"
#include "transport/socket.h"

namespace pipekern {
namespace {

constexpr std::int64_t kSlice = 100 * kMillisecond;

Peer identify(Fd socket) {
    const Credentials who = credentials(socket);
    Peer peer;
    peer.pid = who.pid;
    if (who.uid != geteuid()) return peer;  // no socket: turned away
    peer.pidfd = peer_pidfd(socket, who.pid);
    peer.socket = std::move(socket);
    return peer;
}

// The rank that a freshly accepted peer says it is; -1 for one that says nothing sensible within a second.
int read_hello(const Peer& peer) {
    Frame hello{};
    Fd none;
    if (!poll_socket(peer.socket, POLLIN, kSecond)) return -1;
    if (receive_frame(peer.socket, hello, none) != Received::kFrame || hello.kind != Frame::kHello) return -1;
    if (hello.version != kVersion)
        throw Failure(Fault::kTransport, static_cast<int>(hello.number),
                      "rank " + std::to_string(hello.number) + " speaks version " + std::to_string(hello.version) +
                          " of the message format, this rank version " + std::to_string(kVersion) +
                          ": install the same pipekern on both");
    return static_cast<int>(hello.number);
}

std::string missing(const std::vector<Peer>& peers, int rank) {
    std::string names;
    for (std::size_t other = static_cast<std::size_t>(rank) + 1; other < peers.size(); ++other)
        if (!peers[other].socket) names += (names.empty() ? "rank " : ", rank ") + std::to_string(other);
    return names;
}

}  // namespace

std::string socket_name(const std::string& token, int rank) { return "pipekern-" + token + "-" + std::to_string(rank); }

void connect_mesh(std::vector<Peer>& peers, const Fd& listener, const std::string& token, int rank,
                  std::int64_t timeout_ns, const std::function<void()>& slice) {
    const int world = static_cast<int>(peers.size());
    const Frame hello{Frame::kHello, static_cast<std::uint32_t>(rank), 0, kVersion, 0};

    // 1. Connect to the lower ranks; their backlogs hold all of us, so nobody waits here.
    for (int other = 0; other < rank; ++other) {
        const ForkPause pause;
        Peer peer = identify(connect_abstract(socket_name(token, other)));
        if (!peer.socket)
            throw Failure(Fault::kTransport, other,
                          "the socket of rank " + std::to_string(other) + " belongs to another user");
        send_frame(peer.socket, hello, -1);
        peers[static_cast<std::size_t>(other)] = std::move(peer);
    }

    // 2. Accept the higher ones, in any order; strangers are dropped.
    const std::int64_t deadline = now_ns() + timeout_ns;
    for (int left = world - 1 - rank; left > 0;) {
        slice();
        if (now_ns() > deadline)
            throw Failure(Fault::kTransport, -1,
                          "rank " + std::to_string(rank) + " has waited " + std::to_string(timeout_ns / kSecond) +
                              " s for a connection of " + missing(peers, rank) +
                              "; see there why it did not come, or give more time with timeout=");
        if (!poll_socket(listener, POLLIN, kSlice)) continue;
        const ForkPause pause;
        Fd socket = accept_from(listener);
        if (!socket) continue;
        Peer peer = identify(std::move(socket));
        if (!peer.socket) continue;
        const int other = read_hello(peer);
        if (other <= rank || other >= world || peers[static_cast<std::size_t>(other)].socket) continue;
        peers[static_cast<std::size_t>(other)] = std::move(peer);
        --left;
    }
}

}  // namespace pipekern
