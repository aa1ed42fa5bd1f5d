// A job whose ranks are threads: mesh, abort, closing, dropping out.
#include <fstream>

#include "check.h"
#include "ranks.h"
#include "transport/job.h"
#include "transport/receiver.h"
#include "transport/sender.h"
#include "transport/socket.h"

using namespace pipekern;

namespace {

bool send(Sender& sender, std::uint64_t tag, std::uint64_t value) {
    Label label{tag, 0, 7, 1, 0};  // 7: uint64
    label.shape[0] = 1;
    const Piece piece{&value, sizeof value};
    return sender.send(label, &piece, 1);
}

// A token goes round: every rank adds its number. A stranger that connects first is turned away.
void mesh_and_round() {
    constexpr int kWorld = 4;
    const std::string token = ranks::fresh_token();
    std::vector<std::shared_ptr<Job>> jobs;
    for (int rank = 0; rank < kWorld; ++rank) jobs.push_back(ranks::bind(rank, kWorld, token));
    Fd stranger = connect_abstract(socket_name(token, 0));
    send_frame(stranger, {Frame::kHello, 77, 0, 1, 0}, -1);
    ranks::each(kWorld, [&](int rank) {
        auto& job = jobs[static_cast<std::size_t>(rank)];
        job->connect();
        const int next = (rank + 1) % kWorld, previous = (rank + kWorld - 1) % kWorld;
        Sender sender(job, {static_cast<std::uint32_t>(rank), "ring", 1}, next);
        Receiver receiver(job, {static_cast<std::uint32_t>(previous), "ring", 1}, previous);
        if (rank == 0) CHECK(send(sender, 0, 100));
        CHECK(receiver.wait(0, -1));
        const auto arrival = receiver.take(0);
        const std::uint64_t value = *reinterpret_cast<const std::uint64_t*>(arrival->payload());
        if (rank == 0)
            CHECK_EQUAL(value, 106u);
        else
            CHECK(send(sender, 0, value + static_cast<std::uint64_t>(rank)));
        job->close();
        job->close();
        CHECK_RAISES(Fault::kTransport, -1, "has closed its pipeline", job->check());
    });
    // Nothing listens any more.
    CHECK_RAISES(Fault::kTransport, -1, "has gone", connect_abstract(socket_name(token, 0)));
}

// More links between two ranks than a socket holds frames, both ways: opening them does not lock up.
void many_links() {
    auto jobs = ranks::connected(2);
    constexpr std::uint32_t kLinks = 400;
    ranks::each(2, [&](int rank) {
        auto& job = jobs[static_cast<std::size_t>(rank)];
        std::vector<std::unique_ptr<Sender>> senders;
        for (std::uint32_t n = 0; n < kLinks; ++n)
            if (static_cast<int>(n % 2) == rank)
                senders.push_back(std::make_unique<Sender>(job, LinkName{n, "many", 1}, 1 - rank));
        for (std::uint32_t n = 0; n < kLinks; ++n)
            if (static_cast<int>(n % 2) != rank) Receiver(job, {n, "many", 1}, 1 - rank);
    });
    for (auto& job : jobs) job->close();
}

void the_first_abort_stands() {
    auto jobs = ranks::connected(3);
    ranks::each(3, [&](int rank) { jobs[static_cast<std::size_t>(rank)]->check(); });
    jobs[1]->abort("rank 1 failed: " + std::string(20'000, 'x') + " at the end");
    jobs[2]->abort("too late");
    for (auto& job : jobs) CHECK_RAISES(Fault::kAborted, 1, "x at the end", job->check());
    for (auto& job : jobs) job->close();
}

// An abort reaches who waits, and what has already arrived is not handed out.
void abort_reaches_waits() {
    auto jobs = ranks::connected(2);
    std::unique_ptr<Sender> sender;
    std::unique_ptr<Receiver> receiver;
    ranks::each(2, [&](int rank) {
        if (rank == 0)
            sender = std::make_unique<Sender>(jobs[0], LinkName{0, "0>1", 2}, 1);
        else
            receiver = std::make_unique<Receiver>(jobs[1], LinkName{0, "0>1", 2}, 0);
    });
    ranks::each(2, [&](int rank) {
        if (rank == 1) CHECK_RAISES(Fault::kAborted, 0, "boom", receiver->wait(0, -1));
        while (rank == 0 && !jobs[0]->page().waits(1, now_ns())) sched_yield();
        if (rank == 0) jobs[0]->abort("boom");
    });
    CHECK_RAISES(Fault::kAborted, 0, "boom", send(*sender, 0, 1));
    CHECK_RAISES(Fault::kAborted, 0, "boom", receiver->ready());
    CHECK_RAISES(Fault::kAborted, 0, "boom", receiver->take(0));
}

// What was sent before closing arrives; closing is no death. Who waits for more fails, and with it the whole job.
void closing_is_no_death_but_ends_waits() {
    auto jobs = ranks::connected(3);
    ranks::each(3, [&](int rank) {
        auto& job = jobs[static_cast<std::size_t>(rank)];
        if (rank == 0) {
            Sender sender(job, {0, "0>1", 2}, 1);
            Receiver back(job, {1, "1>0", 1}, 1);
            CHECK(send(sender, 0, 5));
            job->close();
        } else if (rank == 1) {
            Receiver receiver(job, {0, "0>1", 2}, 0);
            Sender back(job, {1, "1>0", 1}, 0);
            while (job->page().state(0) != Page::kClosed) sched_yield();
            CHECK(receiver.wait(0, -1));
            receiver.take(0);
            CHECK(send(back, 0, 1));                                      // a free slot: nobody will read it
            std::this_thread::sleep_for(std::chrono::milliseconds(700));  // longer than a hang-up would be forgiven
            job->check();
            CHECK_RAISES(Fault::kDied, 0, "rank 0 has closed its pipeline", receiver.wait(1, -1));
            CHECK_RAISES(Fault::kDied, 0, "rank 0 has closed its pipeline", send(back, 1, 1));
        }
    });
    CHECK_RAISES(Fault::kDied, 0, "rank 1 waits for the message with tag 1", jobs[2]->check());

    auto others = ranks::connected(2);
    ranks::each(2, [&](int rank) {
        auto& job = others[static_cast<std::size_t>(rank)];
        if (rank == 0) {
            Receiver(job, {0, "1>0", 1}, 1);
            job->close();
        } else {
            Sender sender(job, {0, "1>0", 1}, 0);
            while (job->page().state(0) != Page::kClosed) sched_yield();
            CHECK(send(sender, 0, 1));
            CHECK_RAISES(Fault::kDied, 0, "rank 1 waits for a free slot", send(sender, 1, 1));
        }
    });
}

void dropping_out_is_a_death() {
    auto jobs = ranks::connected(3);
    jobs[1].reset();
    for (int rank : {0, 2}) {
        auto& job = jobs[static_cast<std::size_t>(rank)];
        const std::int64_t start = now_ns();
        while (!job->page().aborted() && now_ns() - start < 20 * kSecond) sched_yield();
        CHECK_RAISES(Fault::kDied, 1, "rank 1 died", job->check());
    }
}

// A link that the other side does not open is waited for like a message.
void a_link_that_nobody_opens() {
    auto jobs = ranks::connected(2, kSecond / 2);
    ranks::each(2, [&](int rank) {
        auto& job = jobs[static_cast<std::size_t>(rank)];
        CHECK_RAISES(Fault::kTimeout, -1, "for rank 0 to open link 'of 0'",
                     Receiver(job, {static_cast<std::uint32_t>(rank), "of " + std::to_string(1 - rank), 1}, 1 - rank));
    });
}

void links_must_agree() {
    auto jobs = ranks::connected(2);
    ranks::each(2, [&](int rank) {
        if (rank == 0) {
            Sender(jobs[0], {0, "left", 1}, 1);
            Sender(jobs[0], {1, "same", 2}, 1);
        } else {
            CHECK_RAISES(Fault::kTransport, 0, "another link than 'right'", Receiver(jobs[1], {0, "right", 1}, 0));
            CHECK_RAISES(Fault::kTransport, 0, "with 3 slots", Receiver(jobs[1], {1, "same", 3}, 0));
        }
    });
}

void a_missing_rank_is_named() {
    const std::string token = ranks::fresh_token();
    auto job = ranks::bind(0, 3, token, kSecond / 5);
    auto other = ranks::bind(1, 3, token, kSecond / 5);
    ranks::each(2, [&](int rank) {
        if (rank == 0)
            CHECK_RAISES(Fault::kTransport, -1, "connection of rank 2", job->connect());
        else
            CHECK_RAISES(Fault::kTransport, -1, "connection of rank 2", other->connect());
    });
    CHECK_RAISES(Fault::kTransport, -1, "not connected", job->check());
}

}  // namespace

int main() {
    mesh_and_round();
    many_links();
    the_first_abort_stands();
    abort_reaches_waits();
    closing_is_no_death_but_ends_waits();
    dropping_out_is_a_death();
    a_link_that_nobody_opens();
    links_must_agree();
    a_missing_rank_is_named();
}
