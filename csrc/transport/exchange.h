// Hands shared memories to peers and takes theirs.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "transport/memory.h"
#include "transport/mesh.h"
#include "transport/socket.h"

namespace pipekern {

class Exchange {
  public:
    // `peers` must outlive it. Memory for the own rank goes by pointer.
    Exchange(int rank, const std::vector<Peer>& peers) : rank_(rank), peers_(peers) {}

    // False when the socket is full: try again later.
    bool pass(int peer, const Frame& frame, const std::shared_ptr<Memory>& memory);

    // What `peer` has passed under this kind, number and generation; empty if it has not come yet. Never waits.
    std::shared_ptr<Memory> take(int peer, Frame::Kind kind, std::uint32_t number, std::uint32_t generation);

    // Takes everything off the socket, for a later take().
    void absorb(int peer);

    // Until something may have come from `peer`, or the time is over.
    void wait(int peer, std::int64_t limit_ns) const;

  private:
    using Key = std::tuple<int, std::uint32_t, std::uint32_t, std::uint32_t>;  // peer, kind, number, generation

    void drain(int peer);

    int rank_;
    const std::vector<Peer>& peers_;
    std::mutex mutex_;
    std::map<Key, std::shared_ptr<Memory>> arrived_;
};

}  // namespace pipekern
