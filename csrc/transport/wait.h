// The adaptive wait: a few pauses, then yields up to 50 µs, then sleep in slices that watch the job.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "transport/job.h"

namespace pipekern {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// 32 looks in about a microsecond: enough for an answer that is on its way from another core.
template <class Ready>
bool spin(const Ready& ready) {
    for (int i = 0; i < 32; ++i) {
        if (ready()) return true;
        pause();
    }
    return false;
}

// A long wait of this rank: tells the others, and every 30 s the log, what it waits for.
class Patience {
  public:
    Patience(Job& job, const Awaited& what, std::int64_t start);

    // To be called at least every 100 ms of the wait. Raises the job's failure, and PeerDied for a peer that has
    // closed, unless ready().
    void check(std::int64_t now, const std::function<bool()>& ready);

  private:
    Job& job_;
    Awaited what_;
    std::int64_t start_;
    std::int64_t next_note_;
};

// True once ready(), false when `limit_ns` has passed (negative: no limit). `sleeping` is 1 while this thread sleeps;
// who makes ready() true clears it and wakes. Raises the job's failure, PeerDied for a peer that has closed, and what
// the observer raises.
bool wait_for(Job& job, const Awaited& what, std::atomic<std::uint32_t>& sleeping, const std::function<bool()>& ready,
              std::int64_t limit_ns);

}  // namespace pipekern
