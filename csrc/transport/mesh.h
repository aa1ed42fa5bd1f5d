// Every rank's sockets to all others, and who they are.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "transport/fd.h"

namespace pipekern {

struct Peer {
    Fd socket;
    Fd pidfd;  // empty where the kernel or a pid namespace has none: then the socket's hang-up tells
    pid_t pid = 0;
};

std::string socket_name(const std::string& token, int rank);

// Connects rank `rank`, which listens on `listener`, with all others, which must have bound their sockets by now, and
// fills `peers`, one entry a rank. Peers of another user are turned away. Calls `slice` at least every 100 ms; raises
// when `timeout_ns` is over.
void connect_mesh(std::vector<Peer>& peers, const Fd& listener, const std::string& token, int rank,
                  std::int64_t timeout_ns, const std::function<void()>& slice);

}  // namespace pipekern
