#include "transport/socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

#include "transport/clock.h"
#include "transport/error.h"

namespace pipekern {
namespace {

constexpr int kType = SOCK_SEQPACKET | SOCK_CLOEXEC;
constexpr int kPeerPidfd = 77;  // SO_PEERPIDFD, Linux 6.5

struct Address {
    sockaddr_un raw{};
    socklen_t size = 0;

    explicit Address(const std::string& name) {
        if (name.size() + 1 > sizeof raw.sun_path)
            throw Failure(Fault::kTransport, -1, "socket name '" + name + "' is longer than 107 bytes");
        raw.sun_family = AF_UNIX;
        std::memcpy(raw.sun_path + 1, name.data(), name.size());  // a leading zero: no file
        size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    }
    const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&raw); }
};

Fd new_socket() {
    Fd fd(socket(AF_UNIX, kType, 0));
    if (!fd) throw_errno("opening a local socket");
    return fd;
}

}  // namespace

Fd listen_abstract(const std::string& name, int backlog) {
    Fd fd = new_socket();
    const Address address(name);
    if (bind(fd.get(), address.get(), address.size) != 0)
        throw_errno("binding the local socket '" + name + "'", "every job needs a token of its own");
    if (listen(fd.get(), backlog) != 0) throw_errno("listening on the local socket '" + name + "'");
    return fd;
}

Fd connect_abstract(const std::string& name) {
    Fd fd = new_socket();
    const Address address(name);
    while (connect(fd.get(), address.get(), address.size) != 0)
        if (errno != EINTR)
            throw_errno("connecting to '" + name + "'",
                        "its rank has not bound yet, has gone, or lives in another network namespace");
    return fd;
}

Fd accept_from(const Fd& listener) {
    Fd fd(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!fd && errno != EINTR && errno != EAGAIN && errno != ECONNABORTED) throw_errno("accepting a peer");
    return fd;
}

Credentials credentials(const Fd& socket) {
    ucred peer{};
    socklen_t size = sizeof peer;
    if (getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) throw_errno("asking who a peer is");
    return {peer.pid, peer.uid};
}

Fd peer_pidfd(const Fd& socket, pid_t pid) {
    int fd = -1;
    socklen_t size = sizeof fd;
    if (getsockopt(socket.get(), SOL_SOCKET, kPeerPidfd, &fd, &size) == 0) return Fd(fd);
    if (pid <= 0) return Fd();
    return Fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));  // close-on-exec by definition
}

bool send_frame(const Fd& socket, const Frame& frame, int fd) {
    Frame copy = frame;
    iovec part{&copy, sizeof copy};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (fd >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        cmsghdr* rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    for (;;) {
        if (sendmsg(socket.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return true;
        if (errno == EAGAIN || errno == ETOOMANYREFS) return false;
        if (errno == EPIPE || errno == ECONNRESET) return true;  // the peer has gone: its death is told elsewhere
        if (errno != EINTR) throw_errno("passing shared memory to a peer");
    }
}

Received receive_frame(const Fd& socket, Frame& frame, Fd& fd) {
    iovec part{&frame, sizeof frame};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    ssize_t size;
    while ((size = recvmsg(socket.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)) < 0) {
        if (errno == EAGAIN) return Received::kNothing;
        // A peer that closed with something unread resets the connection, told once; what it sent is still there.
        if (errno != EINTR && errno != ECONNRESET) throw_errno("reading from a peer's socket");
    }
    const cmsghdr* rights = CMSG_FIRSTHDR(&message);
    if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS) {
        int passed;
        std::memcpy(&passed, CMSG_DATA(rights), sizeof passed);
        fd = Fd(passed);
    }
    if (size == 0) return Received::kHangUp;
    if (size != sizeof frame) throw Failure(Fault::kTransport, -1, "a peer's frame has a wrong size");
    return Received::kFrame;
}

bool poll_socket(const Fd& socket, short events, std::int64_t limit_ns) {
    pollfd entry{socket.get(), events, 0};
    return poll(&entry, 1, static_cast<int>(limit_ns / kMillisecond)) > 0;
}

}  // namespace pipekern
