#include "transport/job.h"

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
      guard_([this] { become_child(); }) {}

Job::~Job() { watcher_.reset(); }

void Job::connect() {
    peers_ = connect_mesh(listener_, token_, rank_, world_, timeout_ns_, [this] { observer_->slice(); });
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
        page_ = std::make_unique<Page>(take(0, Frame::kPage, 0, "the job's page"), rank_, world_);
        return;
    }
    auto memory = Memory::create(bytes);
    page_ = std::make_unique<Page>(memory, rank_, world_);
    for (int peer = 1; peer < world_; ++peer) exchange_->pass(peer, {Frame::kPage, 0, 0, kVersion, bytes}, memory);
    memory->drop_fd();
}

void Job::abort(const std::string& text) {
    if (usable_.load()) page_->abort(Fault::kAborted, rank_, text);
}

void Job::close() {
    listener_.close();
    if (!usable_.exchange(false)) return;
    page_->set_state(Page::kClosed);  // first: what hangs up afterwards is no death
    watcher_.reset();
    for (Peer& peer : peers_) {
        peer.socket.close();
        peer.pidfd.close();
    }
}

void Job::become_child() {
    session_->inherited.store(true);
    usable_.store(false);
    listener_.close();
    for (Peer& peer : peers_) {
        peer.socket.close();
        peer.pidfd.close();
    }
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

void Job::check_open(int peer, const std::string& waits_for) const {
    if (peer == rank_ || page_->state(peer) != Page::kClosed) return;
    // Told to every rank: its neighbours have nothing to wait for either, and must name the same rank.
    page_->abort(Fault::kDied, peer,
                 rank_name(peer) + " has closed its pipeline, and " + rank_name(rank_) + " waits for " + waits_for +
                     " from it; every rank must take the same number of steps before it closes");
    page_->check();
}

std::shared_ptr<Memory> Job::take(int peer, Frame::Kind kind, std::uint32_t number, const std::string& what) {
    const std::int64_t deadline = now_ns() + timeout_ns_;
    for (;;) {
        if (auto memory = exchange_->take(peer, kind, number, 0)) return memory;
        if (page_) {
            page_->check();
            check_open(peer, what);
        }
        if (now_ns() > deadline)
            throw Failure(Fault::kTransport, peer,
                          rank_name(rank_) + " has waited " + std::to_string(timeout_ns_ / kSecond) + " s for " + what +
                              " from " + rank_name(peer) + ": do both ranks open the same links?");
        observer_->slice();
        exchange_->wait(peer, kSlice);
    }
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
