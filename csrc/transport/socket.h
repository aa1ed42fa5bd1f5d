// AF_UNIX sockets in the abstract namespace (no file), between processes of one user, that carry descriptors.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "transport/fd.h"

namespace pipekern {

// What is said over a socket; a shared memory's descriptor may come with it.
struct Frame {
    enum Kind : std::uint32_t { kHello = 1, kPage = 2, kControl = 3, kData = 4, kBoard = 5, kStage = 6 };

    Kind kind;
    std::uint32_t number;      // hello: the sender's rank; else the link
    std::uint32_t generation;  // data, stage: which memory of the link
    std::uint32_t version;
    std::uint64_t bytes;  // size of the memory
};

struct Credentials {
    pid_t pid;  // 0 where the peer's process is not visible from this pid namespace
    uid_t uid;
};

Fd listen_abstract(const std::string& name, int backlog);
Fd connect_abstract(const std::string& name);
Fd accept_from(const Fd& listener);

Credentials credentials(const Fd& socket);

// A descriptor that becomes readable when the socket's peer process ends; empty where the kernel has none.
Fd peer_pidfd(const Fd& socket, pid_t pid);

// False when the socket's buffer is full. `fd` is -1 for none.
bool send_frame(const Fd& socket, const Frame& frame, int fd);

enum class Received { kFrame, kNothing, kHangUp };

// Never waits.
Received receive_frame(const Fd& socket, Frame& frame, Fd& fd);

// Whether `events` (POLLIN, ...) came on `socket` within `limit_ns`.
bool poll_socket(const Fd& socket, short events, std::int64_t limit_ns);

}  // namespace pipekern
