// The thread that beats for its rank and looks after the others. It never needs Python's lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "transport/fd.h"
#include "transport/mesh.h"
#include "transport/page.h"

namespace pipekern {

class Watcher {
  public:
    // `page` and `peers` must outlive it. Looks every 50 ms, and at once when a peer's process ends. Who is waited for
    // is frozen when its process has neither beaten nor used CPU time for an eighth of the timeout (but at least a
    // second), or has not beaten for all of it: a starved machine gets that long, and so does a debugger.
    Watcher(Page& page, const std::vector<Peer>& peers, std::int64_t timeout_ns);
    ~Watcher();  // stops and joins
    Watcher(const Watcher&) = delete;
    Watcher& operator=(const Watcher&) = delete;

    // In a forked child the thread is not there: forget it.
    void disown();

  private:
    // What this thread has seen of a peer.
    struct Sight {
        bool process = true;          // its pidfd is still watched
        bool socket = true;           // its socket is still watched
        std::int64_t hung_up_at = 0;  // hung up without having closed
        std::int64_t heartbeat = 0;   // last one seen
        std::int64_t silent_ns = 0;   // since it changed, in time that this thread was awake
        std::uint64_t cpu_ticks = 0;  // of its process, last ones seen
        std::int64_t still_ns = 0;    // the part of the silence without CPU time and without a debugger
    };

    void run();
    void look(std::int64_t wait_ns);
    void judge_death(int rank, std::int64_t now);
    void judge_silence(std::int64_t now, std::int64_t awake_ns);
    void listen(int rank, std::int64_t awake_ns);
    void judge_deadlock(std::int64_t now);

    Page& page_;
    const std::vector<Peer>& peers_;
    std::int64_t timeout_ns_;
    std::int64_t freeze_ns_;  // for which a peer may be still
    std::vector<Sight> sights_;
    Fd stop_fd_;
    std::atomic<bool> stop_{false};
    std::unique_ptr<std::thread> thread_;
};

}  // namespace pipekern
