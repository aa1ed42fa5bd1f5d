// The job's page, mapped by every rank: has the job failed, who lives, who waits for what.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transport/error.h"
#include "transport/memory.h"

namespace pipekern {

// What a rank waits for: a message from `peer`, a free slot at `peer`, or that `peer` opens the link.
struct Awaited {
    enum Kind : std::uint32_t { kMessage = 0, kSlot = 1, kLink = 2 };

    Kind kind;
    int peer;
    std::uint64_t tag;
    const std::string* link;
};

// "the message with tag 3 on link '0>1' from rank 0"
std::string describe(const Awaited& what);

// One rank's stall, as the others see it.
struct Stall {
    int rank;
    std::int64_t since_ns;
    std::string what;  // as describe() says it
};

class Page {
  public:
    enum State : std::uint32_t { kAbsent = 0, kRunning = 1, kClosed = 2 };

    static std::size_t size(int world);
    Page(std::shared_ptr<Memory> memory, int rank, int world);

    // The job's failure. The first one stands; true if it was this one.
    bool abort(Fault kind, int root, const std::string& text);
    bool aborted() const { return head().abort.load(std::memory_order_acquire) != 0; }
    // Raises the job's failure if there is one; cheap enough for every message.
    void check() const {
        if (aborted()) raise();
    }

    // Life. A rank writes its own record only.
    void set_state(State state);
    State state(int rank) const { return static_cast<State>(record(rank).state.load()); }
    void beat(std::int64_t now) { mine().heartbeat_ns.store(now, std::memory_order_relaxed); }
    std::int64_t heartbeat(int rank) const { return record(rank).heartbeat_ns.load(std::memory_order_relaxed); }

    // Waiting. A rank waits from its first stalled() on, until progress(), or until it stops to say so:
    // a queued send that is tried again and again counts like one long wait.
    void stalled(const Awaited& what, std::int64_t now);
    void progress() {
        if (stalled_.load(std::memory_order_relaxed)) clear_stall();
    }
    bool waits(int rank, std::int64_t now) const;
    // Since when all running ranks have been waiting at once; 0 when one does not.
    std::int64_t all_wait_since(std::int64_t now) const;
    std::vector<Stall> stalls(std::int64_t now) const;

    // Counts the calls of a rank's steward (csrc/cuda/steward.h), which sleeps on it.
    std::atomic<std::uint32_t>& bell(int rank) const { return record(rank).bell; }

    int rank() const { return rank_; }
    int world() const { return world_; }

  private:
    static constexpr std::size_t kTextBytes = 8192;
    static constexpr std::size_t kNameWords = 12;

    struct Head {
        std::atomic<std::uint64_t> abort;  // kind in the high half, root rank + 1 in the low
        std::atomic<std::uint32_t> text_ready;
        std::uint32_t text_bytes;
        alignas(64) char text[kTextBytes];
    };
    struct alignas(64) Record {
        std::atomic<std::int64_t> heartbeat_ns;
        std::atomic<std::uint32_t> state;
        std::atomic<std::uint32_t> bell;
        alignas(64) std::atomic<std::int64_t> since_ns;
        std::atomic<std::int64_t> last_ns;
        std::atomic<std::uint32_t> kind;
        std::atomic<std::int32_t> peer;
        std::atomic<std::uint64_t> tag;
        std::atomic<std::uint64_t> name[kNameWords];
    };

    Head& head() const { return *reinterpret_cast<Head*>(memory_->data()); }
    Record& record(int rank) const { return reinterpret_cast<Record*>(memory_->data() + sizeof(Head))[rank]; }
    Record& mine() { return record(rank_); }
    [[noreturn]] void raise() const;
    void clear_stall();
    static std::string describe_record(const Record& record);

    std::shared_ptr<Memory> memory_;
    int rank_;
    int world_;
    std::atomic<bool> stalled_{false};
};

}  // namespace pipekern
