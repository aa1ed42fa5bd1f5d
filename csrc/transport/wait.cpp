#include "transport/wait.h"

#include <sched.h>

#include <algorithm>
#include <string>

#include "transport/clock.h"
#include "transport/futex.h"

namespace pipekern {
namespace {

// Measured on two cores: a message across them is seen in 0.4 µs, and on one shared core in 3 µs, as long as the
// waiting side yields instead of sleeping; 50 µs bound what that burns.
constexpr std::int64_t kYield = 50 * kMicrosecond;
constexpr std::int64_t kSlice = 50 * kMillisecond;
constexpr std::int64_t kNote = 30 * kSecond;

void sleep_slice(std::atomic<std::uint32_t>& sleeping, const std::function<bool()>& ready, std::int64_t limit_ns) {
    // Both sides store first and look second, in one total order: either the look here sees the message, or the
    // sender's look sees the sleeper.
    sleeping.store(1, std::memory_order_seq_cst);
    if (!ready()) futex_wait(sleeping, 1, limit_ns);
    sleeping.store(0, std::memory_order_relaxed);
}

}  // namespace

Patience::Patience(Job& job, const Awaited& what, std::int64_t start)
    : job_(job), what_(what), start_(start), next_note_(start + kNote) {}

void Patience::check(std::int64_t now, const std::function<bool()>& ready) {
    job_.check();
    // ready() is looked at after the state: a peer sends before it closes.
    if (job_.has_closed(what_.peer) && !ready()) job_.fail_closed(what_);
    job_.page().stalled(what_, now);
    if (now < next_note_) return;
    job_.observer().note("rank " + std::to_string(job_.rank()) + " has waited " +
                         std::to_string((now - start_) / kSecond) + " s for " + describe(what_) + ", which is alive");
    next_note_ += kNote;
}

bool wait_for(Job& job, const Awaited& what, std::atomic<std::uint32_t>& sleeping, const std::function<bool()>& ready,
              std::int64_t limit_ns) {
    const std::int64_t start = now_ns();
    const auto over = [&](std::int64_t now) { return limit_ns >= 0 && now - start >= limit_ns; };
    std::int64_t now = start;
    for (; now - start < kYield && !over(now); now = now_ns()) {
        if (ready()) return true;
        sched_yield();
    }
    for (Patience patience(job, what, start);; now = now_ns()) {
        patience.check(now, ready);
        if (ready()) return true;
        if (over(now)) return false;
        sleep_slice(sleeping, ready, limit_ns < 0 ? kSlice : std::min(kSlice, limit_ns - (now - start)));
        if (ready()) return true;
        job.observer().slice();
    }
}

}  // namespace pipekern
