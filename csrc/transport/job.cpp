#include "transport/job.h"

#include <poll.h>

#include "transport/clock.h"
#include "transport/header.h"
#include "transport/socket.h"

namespace pipekern {
namespace {

constexpr std::int64_t kSlice = 50 * kMillisecond;

std::string rank_name(int rank) { return "rank " + std::to_string(rank); }

}  // namespace

Job::Job(int rank, int world, const std::string& token, std::int64_t timeout_ns, std::unique_ptr<Observer> observer)
    : rank_(rank),
      world_(world),
      token_(token),
      timeout_ns_(timeout_ns),
      observer_(std::move(observer)),
      listener_(listen_abstract(socket_name(token, rank), world)),
      peers_(static_cast<std::size_t>(world)),
      guard_([this] { become_child(); }) {}

Job::~Job() { watcher_.reset(); }

void Job::connect() {
    connect_mesh(peers_, listener_, token_, rank_, timeout_ns_, [this] { observer_->slice(); });
    listener_.close();
    exchange_ = std::make_unique<Exchange>(rank_, peers_);
    share_page();
    page_->set_state(Page::kRunning);
    watcher_ = std::make_unique<Watcher>(*page_, peers_, timeout_ns_);
    usable_.store(true);
}

void Job::share_page() {
    const std::size_t bytes = Page::size(world_);
    if (rank_ != 0) {
        page_ = std::make_unique<Page>(take_page(), rank_, world_);
        return;
    }
    auto memory = Memory::create(bytes);
    page_ = std::make_unique<Page>(memory, rank_, world_);
    for (int peer = 1; peer < world_; ++peer) exchange_->pass(peer, {Frame::kPage, 0, 0, kVersion, bytes}, memory);
    memory->drop_fd();
}

std::shared_ptr<Memory> Job::take_page() {
    // Rank 0 passes it once all have connected, for which they have timeout_ns_.
    for (const std::int64_t deadline = now_ns() + timeout_ns_;;) {
        if (auto memory = exchange_->take(0, Frame::kPage, 0, 0)) return memory;
        if (now_ns() > deadline)
            throw Failure(Fault::kTransport, 0,
                          rank_name(rank_) + " has waited " + std::to_string(timeout_ns_ / kSecond) +
                              " s for rank 0, which waits for other ranks or has failed: see there");
        observer_->slice();
        exchange_->wait(0, kSlice);
    }
}

void Job::abort(const std::string& text) {
    if (usable_.load()) page_->abort(Fault::kAborted, rank_, text);
}

void Job::close() {
    listener_.close();
    if (!usable_.exchange(false)) return;
    page_->set_state(Page::kClosed);  // first: what hangs up afterwards is no death
    watcher_.reset();
    const ForkPause pause;
    close_sockets();
}

void Job::close_sockets() {
    listener_.close();
    for (Peer& peer : peers_) {
        peer.socket.close();
        peer.pidfd.close();
    }
}

void Job::become_child() {
    session_->inherited.store(true);
    usable_.store(false);
    close_sockets();
    if (watcher_) watcher_->disown();
}

void Job::raise_unusable() const {
    if (session_->inherited.load())
        throw Failure(Fault::kTransport, -1,
                      "this process was forked from " + rank_name(rank_) +
                          " and is no rank itself: send and receive in the process that opened the job");
    throw Failure(
        Fault::kTransport, -1,
        page_ ? rank_name(rank_) + " has closed its pipeline: open a new one" : "the job is not connected yet");
}

bool Job::has_died(int peer) const {
    const Fd& process = peers_[static_cast<std::size_t>(peer)].pidfd;
    return process && poll_socket(process, POLLIN, 0);
}

void Job::fail_closed(const Awaited& what) const {
    // Told to every rank: its neighbours have nothing to wait for either, and must name the same rank.
    page_->abort(Fault::kDied, what.peer,
                 rank_name(what.peer) + " has closed its pipeline, and " + rank_name(rank_) + " waits for " +
                     describe(what) + "; every rank must take the same number of steps before it closes");
    page_->check();
}

void Job::pass(int peer, const Frame& frame, const std::shared_ptr<Memory>& memory) {
    while (!exchange_->pass(peer, frame, memory)) {
        check();
        // Both sides may be passing: what this one does not take off the socket, the other cannot put on.
        exchange_->absorb(peer);
        exchange_->wait(peer, kMillisecond);
        observer_->slice();
    }
}

}  // namespace pipekern
