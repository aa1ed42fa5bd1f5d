// A link's control memory: for every slot a header with the data flag, and the credit flag.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "transport/digest.h"
#include "transport/futex.h"
#include "transport/header.h"
#include "transport/job.h"
#include "transport/memory.h"

namespace pipekern {

struct LinkName {
    std::uint32_t number;  // its place in the job's list of links
    std::string name;
    std::uint64_t slots;
};

// Message n, counted from 1, goes into slot (n - 1) mod slots. The sender alone writes the header, and last of all
// seq = n; the receiver alone writes credit = n, when the last view of the message has died. So n may be written
// once credit is n - slots; both only grow.
class Ring {
  public:
    struct Slot {
        alignas(128) Header header;  // two cache lines apart: processors fetch them in pairs
        alignas(128) std::atomic<std::uint64_t> credit;
    };

    static std::size_t size(std::uint64_t slots) { return align_up(sizeof(Head) + slots * sizeof(Slot), 4096); }

    Ring(std::shared_ptr<Memory> memory, std::uint64_t slots, std::shared_ptr<const Session> session)
        : memory_(std::move(memory)), slots_(slots), session_(std::move(session)) {}

    // The sender signs what it opened; whether the receiver means the same link.
    void sign(const LinkName& link) {
        head().slots = link.slots;
        head().name = digest(link.name.data(), link.name.size(), 0);
    }
    bool signed_as(const LinkName& link) const {
        return memory_->size() == size(link.slots) && head().slots == link.slots &&
               head().name == digest(link.name.data(), link.name.size(), 0);
    }

    std::uint64_t index(std::uint64_t seq) const { return (seq - 1) % slots_; }
    Slot& slot(std::uint64_t seq) const { return reinterpret_cast<Slot*>(memory_->data() + sizeof(Head))[index(seq)]; }
    // 1 while the receiver sleeps until a message comes.
    std::atomic<std::uint32_t>& sleeping() const { return head().sleeping; }

    // The receiver may take message `seq`, which is whole; wakes it where it sleeps. In order, from any thread.
    void announce(std::uint64_t seq) const {
        slot(seq).header.seq.store(seq, std::memory_order_seq_cst);
        if (sleeping().load(std::memory_order_seq_cst) == 0) return;
        sleeping().store(0, std::memory_order_relaxed);
        futex_wake(sleeping());
    }
    bool arrived(std::uint64_t seq) const { return slot(seq).header.seq.load(std::memory_order_seq_cst) == seq; }
    bool has_credit(std::uint64_t seq) const {
        return seq <= slots_ || slot(seq).credit.load(std::memory_order_acquire) == seq - slots_;
    }
    bool credited(std::uint64_t seq) const { return slot(seq).credit.load(std::memory_order_acquire) >= seq; }
    void give_credit(std::uint64_t seq) const {
        // In a forked child the view is a copy; the parent still reads the slot.
        if (!session_->inherited.load(std::memory_order_relaxed))
            slot(seq).credit.store(seq, std::memory_order_release);
    }

  private:
    struct Head {
        alignas(128) std::atomic<std::uint32_t> sleeping;
        std::uint64_t slots;  // what the sender opened, for the receiver to compare
        std::uint64_t name;
    };

    Head& head() const { return *reinterpret_cast<Head*>(memory_->data()); }

    std::shared_ptr<Memory> memory_;
    std::uint64_t slots_;
    std::shared_ptr<const Session> session_;
};

// One call at a time on each end of a link; a second one raises instead of corrupting a message.
class Turn {
  public:
    Turn(std::atomic_flag& taken, const std::string& link) : taken_(taken) {
        if (taken_.test_and_set(std::memory_order_acquire))
            throw Failure(Fault::kTransport, -1, "two threads use the same end of link '" + link + "' at once");
    }
    ~Turn() { taken_.clear(std::memory_order_release); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

  private:
    std::atomic_flag& taken_;
};

}  // namespace pipekern
