// Frames and descriptors over a local socket.
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "check.h"
#include "ranks.h"
#include "transport/memory.h"
#include "transport/socket.h"

using namespace pipekern;

namespace {

void frames_and_descriptors() {
    const std::string name = ranks::fresh_token();
    Fd listener = listen_abstract(name, 4);
    Fd client = connect_abstract(name);
    Fd server = accept_from(listener);
    CHECK_EQUAL(credentials(server).uid, geteuid());
    CHECK_EQUAL(credentials(server).pid, getpid());
    CHECK_RAISES(Fault::kTransport, -1, "token", listen_abstract(name, 4));

    Frame frame{};
    Fd fd;
    CHECK(receive_frame(server, frame, fd) == Received::kNothing);
    auto memory = Memory::create(4096);
    memory->data()[7] = std::byte{9};
    CHECK(send_frame(client, {Frame::kData, 3, 5, 1, 4096}, memory->fd()));
    CHECK(send_frame(client, {Frame::kHello, 4, 0, 1, 0}, -1));
    CHECK(receive_frame(server, frame, fd) == Received::kFrame);
    CHECK(frame.kind == Frame::kData && frame.number == 3 && frame.generation == 5 && frame.bytes == 4096);
    CHECK(Memory::map(std::move(fd), 4096)->data()[7] == std::byte{9});
    Fd none;
    CHECK(receive_frame(server, frame, none) == Received::kFrame);
    CHECK(frame.kind == Frame::kHello && !none);

    // What was sent before a hang-up still arrives, also if the other left something unread; sending to who has gone
    // is no error here.
    CHECK(send_frame(client, frame, -1));
    CHECK(send_frame(server, frame, -1));
    client.close();
    CHECK(receive_frame(server, frame, none) == Received::kFrame);
    CHECK(receive_frame(server, frame, none) == Received::kHangUp);
    CHECK(send_frame(server, frame, -1));
}

void a_full_socket_refuses() {
    const std::string name = ranks::fresh_token();
    Fd listener = listen_abstract(name, 4);
    Fd client = connect_abstract(name);
    Fd server = accept_from(listener);
    int sent = 0;
    while (send_frame(client, {Frame::kHello, 0, 0, 1, 0}, -1)) ++sent;
    CHECK(sent > 10);
    Frame frame{};
    Fd none;
    for (int i = 0; i < sent; ++i) CHECK(receive_frame(server, frame, none) == Received::kFrame);
    CHECK(send_frame(client, frame, -1));
}

void a_pidfd_tells_the_end() {
    const std::string name = ranks::fresh_token();
    Fd listener = listen_abstract(name, 4);
    const pid_t child = fork();
    if (child == 0) {
        Fd client = connect_abstract(name);
        pause();
        std::_Exit(0);
    }
    Fd server = accept_from(listener);
    CHECK_EQUAL(credentials(server).pid, child);
    Fd pidfd = peer_pidfd(server, child);
    CHECK(static_cast<bool>(pidfd));
    CHECK(!poll_socket(pidfd, POLLIN, 0));
    kill(child, SIGKILL);
    CHECK(poll_socket(pidfd, POLLIN, 10 * kSecond));
    waitpid(child, nullptr, 0);
}

}  // namespace

int main() {
    a_pidfd_tells_the_end();
    frames_and_descriptors();
    a_full_socket_refuses();
}
