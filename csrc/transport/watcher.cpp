#include "transport/watcher.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>

#include <algorithm>

#include "transport/clock.h"
#include "transport/process.h"

namespace pipekern {
namespace {

constexpr std::int64_t kBeat = 50 * kMillisecond;
// A rank that was stopped itself (Ctrl-Z of the whole job), or starved with all others, has seen little of their
// silence.
constexpr std::int64_t kLongestGap = 2 * kBeat;
// A process that ends closes its sockets first: its pidfd is given this long to tell the better reason.
constexpr std::int64_t kGrace = 500 * kMillisecond;
// A heart that beat within this time is no frozen one.
constexpr std::int64_t kFresh = kSecond;
constexpr std::int64_t kFreezeShare = 8;  // of the timeout

std::string seconds(std::int64_t ns) {
    const std::int64_t tenths = ns / (kSecond / 10);
    return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " s";
}

}  // namespace

Watcher::Watcher(Page& page, const std::vector<Peer>& peers, std::int64_t timeout_ns)
    : page_(page),
      peers_(peers),
      timeout_ns_(timeout_ns),
      freeze_ns_(std::min(timeout_ns, std::max(timeout_ns / kFreezeShare, kSecond))),
      sights_(peers.size()),
      stop_fd_(eventfd(0, EFD_CLOEXEC)) {
    if (!stop_fd_) throw_errno("eventfd");
    // Signals are Python's main thread's.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::make_unique<std::thread>([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Watcher::~Watcher() {
    if (!thread_) return;
    stop_.store(true);
    eventfd_write(stop_fd_.get(), 1);
    thread_->join();
}

void Watcher::disown() {
    static_cast<void>(thread_.release());  // leaked: destroying a joinable thread would end the process
    stop_fd_.close();
}

void Watcher::run() {
    std::int64_t before = now_ns();
    while (!stop_.load()) {
        page_.beat(now_ns());
        look(kBeat);
        const std::int64_t now = now_ns();
        if (!page_.aborted() && !stop_.load()) {
            for (int rank = 0; rank < page_.world(); ++rank)
                if (rank != page_.rank()) judge_death(rank, now);
            judge_silence(now, std::min(now - before, kLongestGap));
            judge_deadlock(now);
        }
        before = now;
    }
}

// Sleeps until a process ends, a socket hangs up, the stop event comes, or the time is over.
void Watcher::look(std::int64_t wait_ns) {
    std::vector<pollfd> entries{{stop_fd_.get(), POLLIN, 0}};
    for (std::size_t rank = 0; rank < peers_.size(); ++rank) {  // poll() passes over negative descriptors
        entries.push_back({sights_[rank].process ? peers_[rank].pidfd.get() : -1, POLLIN, 0});
        entries.push_back({sights_[rank].socket ? peers_[rank].socket.get() : -1, POLLRDHUP, 0});
    }
    if (poll(entries.data(), entries.size(), static_cast<int>(wait_ns / kMillisecond)) <= 0) return;
    for (std::size_t rank = 0; rank < peers_.size(); ++rank) {
        Sight& sight = sights_[rank];
        if (entries[1 + 2 * rank].revents) sight.process = false;
        if (entries[2 + 2 * rank].revents) {
            sight.socket = false;
            sight.hung_up_at = now_ns();
        }
    }
}

void Watcher::judge_death(int rank, std::int64_t now) {
    const Sight& sight = sights_[static_cast<std::size_t>(rank)];
    if ((sight.process && sight.socket) || page_.state(rank) == Page::kClosed) return;
    const Peer& peer = peers_[static_cast<std::size_t>(rank)];
    const std::string name = "rank " + std::to_string(rank);
    const std::string mend = "; the cause is in the output of " + name + ". Start all ranks again";
    if (!sight.process)
        page_.abort(Fault::kDied, rank,
                    name + " died: its process " + std::to_string(peer.pid) + " has ended without closing" + mend);
    else if (!peer.pidfd || now - sight.hung_up_at > kGrace)
        page_.abort(Fault::kDied, rank,
                    name + " died: process " + std::to_string(peer.pid) + " has dropped its connection" + mend);
}

void Watcher::judge_silence(std::int64_t now, std::int64_t awake_ns) {
    for (int rank = 0; rank < page_.world(); ++rank) {
        listen(rank, awake_ns);
        const Sight& sight = sights_[static_cast<std::size_t>(rank)];
        const bool still = sight.still_ns >= freeze_ns_;
        if (rank == page_.rank() || page_.state(rank) != Page::kRunning) continue;
        if (!still && sight.silent_ns < timeout_ns_) continue;
        if (!page_.waits(page_.rank(), now)) continue;  // nobody here needs it yet
        const std::string pid = std::to_string(peers_[static_cast<std::size_t>(rank)].pid);
        const std::string sign = still
                                     ? " lives but has neither beaten nor used CPU time for " + seconds(sight.still_ns)
                                     : " lives but has not beaten for " + seconds(sight.silent_ns);
        page_.abort(
            Fault::kFrozen, rank,
            "rank " + std::to_string(rank) + " is frozen: process " + pid + sign +
                "; it is stopped, swapped out, or its machine is overloaded. See it with `ps -o stat,wchan -p " + pid +
                "`, or give more time with timeout= (" + seconds(timeout_ns_) + " now, " + seconds(freeze_ns_) +
                " for a process that is still)");
    }
}

// Notes for how long `rank` has given no sign of life.
void Watcher::listen(int rank, std::int64_t awake_ns) {
    Sight& sight = sights_[static_cast<std::size_t>(rank)];
    const std::int64_t beat = page_.heartbeat(rank);
    const bool silent = beat == sight.heartbeat;
    sight.heartbeat = beat;
    sight.silent_ns = silent ? sight.silent_ns + awake_ns : 0;
    if (!silent) {
        sight.still_ns = 0;
        return;
    }
    const Pulse seen = pulse(peers_[static_cast<std::size_t>(rank)].pid);
    sight.still_ns = seen.debugged || seen.cpu_ticks != sight.cpu_ticks ? 0 : sight.still_ns + awake_ns;
    sight.cpu_ticks = seen.cpu_ticks;
}

void Watcher::judge_deadlock(std::int64_t now) {
    const std::int64_t since = page_.all_wait_since(now);
    if (since == 0 || now - since < timeout_ns_) return;
    std::string text = "every rank has waited for " + seconds(now - since) + ", so nobody can go on:";
    for (const Stall& stall : page_.stalls(now)) {
        if (sights_[static_cast<std::size_t>(stall.rank)].silent_ns > kFresh) return;  // frozen while it waited
        text += "\n  * rank " + std::to_string(stall.rank) + " waits " + seconds(now - stall.since_ns) + " for " +
                stall.what;
    }
    page_.abort(Fault::kTimeout, -1, text + "\ncheck the schedule with `pipekern schedule check`");
}

}  // namespace pipekern
