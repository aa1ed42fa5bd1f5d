// A link's page of flags and requests, in host memory that both ends register with CUDA: what streams wait for and
// write, and how the sender asks for slots.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/memory.h"
#include "transport/digest.h"
#include "transport/ring.h"

namespace pipekern::cuda {

// How a message's tensors get from one end to the other.
enum class Way : std::uint32_t {
    kNone = 0,    // not known before the first tensor
    kLocal = 1,   // both ends in one process: straight into the receiver's memory
    kIpc = 2,     // the same over CUDA IPC
    kStaged = 3,  // through registered host memory
};

// More than any sequence number; streams compare by the sign of the difference.
constexpr std::uint64_t kReleased = (std::uint64_t{1} << 63) - 1;

class Board {
  public:
    // The flags of one slot. Streams write and wait for them.
    struct Lane {
        alignas(128) std::atomic<std::uint64_t> data;    // the sender's stream: message n is whole
        std::atomic<std::uint32_t> generation;           // the sender: of the slots that the message lies in
        alignas(128) std::atomic<std::uint64_t> credit;  // the receiver's stream: message n has been used
    };

    // What the sender asks for, written before `wanted`.
    struct Want {
        Way way;
        int device;  // the sender's, as this process counts them
        std::uint64_t slot_bytes;
        std::uint64_t landing_bytes;  // of a slot's tensors where they cannot be used as they lie in it; else 0
    };

    // The answer, written before `granted`.
    struct Grant {
        std::uint64_t address;  // in this process, where the way is local
        IpcHandle handle;       // where it is IPC
        char refusal[256];      // why not, where that is not empty
    };

    static std::size_t size(std::uint64_t slots) { return align_up(sizeof(Head) + slots * sizeof(Lane), 4096); }

    Board(std::shared_ptr<const Context> context, std::shared_ptr<Memory> memory, std::uint64_t slots)
        : memory_(std::move(context), std::move(memory)), slots_(slots) {}

    Lane& lane(std::uint64_t seq) const {
        return reinterpret_cast<Lane*>(memory_.host()->data() + sizeof(Head))[(seq - 1) % slots_];
    }
    Pointer address(const std::atomic<std::uint64_t>& flag) const { return memory_.pointer_to(&flag); }
    std::uint64_t slots() const { return slots_; }

    Want& want() const { return head().want; }
    Grant& grant() const { return head().grant; }
    std::atomic<std::uint32_t>& wanted() const { return head().wanted; }    // the sender: generation asked for
    std::atomic<std::uint32_t>& granted() const { return head().granted; }  // the receiver: generation answered
    std::atomic<std::uint32_t>& asking() const { return head().asking; }    // 1 while the sender sleeps for an answer
    std::atomic<std::uint32_t>& closing() const { return head().closing; }  // the receiver wants to free its slots
    std::atomic<std::uint32_t>& ended() const { return head().ended; }      // the sender uses them no more

  private:
    struct Head {
        alignas(128) std::atomic<std::uint32_t> wanted;
        Want want;
        std::atomic<std::uint32_t> asking;
        std::atomic<std::uint32_t> ended;
        alignas(128) std::atomic<std::uint32_t> granted;
        Grant grant;
        std::atomic<std::uint32_t> closing;
    };

    Head& head() const { return *reinterpret_cast<Head*>(memory_.host()->data()); }

    RegisteredMemory memory_;
    std::uint64_t slots_;
};

}  // namespace pipekern::cuda
