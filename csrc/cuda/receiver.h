// The receiving end of a link between devices, and the messages in its slots.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/consumers.h"
#include "cuda/flags.h"
#include "cuda/kernels.h"
#include "cuda/parcel.h"
#include "cuda/steward.h"
#include "transport/dlpack.h"
#include "transport/receiver.h"

namespace pipekern::cuda {

// A message with its tensors, which may be used by what is queued from now on in the stream that took it.
struct Delivery {
    std::shared_ptr<Arrival> arrival;  // gives the credit back when it goes
    std::shared_ptr<void> memory;      // that the tensors lie in
    Pointer base = 0;
    Parcel parcel;
    bool landed = false;  // the casts are undone

    std::uint64_t offset(std::size_t part) const {
        return landed ? parcel.parts[part].landing : parcel.parts[part].offset;
    }
};

class DeviceReceiver : public Ward, public std::enable_shared_from_this<DeviceReceiver> {
  public:
    // Takes control memory and board from the sender; waits for them.
    DeviceReceiver(std::shared_ptr<Job> job, std::shared_ptr<Steward> steward, LinkName link, int source, Codec codec,
                   std::shared_ptr<const Context> context, bool wait_on_host);
    ~DeviceReceiver() override;

    bool announced() const { return host_.announced(); }
    bool ready() const { return host_.ready(); }
    bool spin() const { return host_.spin(); }
    bool wait(std::uint64_t tag, std::int64_t limit_ns) { return host_.wait(tag, limit_ns); }

    // The next message, which must be there and must have this tag; later work of `consumer` begins when its tensors
    // are whole. Its slot is free again after the work that is in `consumer` when the delivery goes.
    Delivery take(std::uint64_t tag, StreamHandle consumer);

    // Takes and forgets every message that has been announced.
    void drain(StreamHandle consumer);

    // Adds the next message, which must be there, to `into`, in one pass from the slot. False, and the message is left,
    // if it is not one tensor of the same size and dtype, and that fp32, bf16 or fp16.
    bool take_into(std::uint64_t tag, StreamHandle consumer, const DeviceTensor& into);

    std::vector<std::shared_ptr<const Arrival>> held() const { return host_.held(); }
    bool owns(std::uintptr_t pointer) const;
    int device() const { return context_->device(); }

    // Waits for what streams still do with the link, then gives its memory back, as soon as the sender does not use
    // it; memory that the sender does not let go in time stays until the process ends.
    void close();

    void tend() override;

  private:
    struct Slots {
        Way way = Way::kNone;
        std::uint64_t slot_bytes = 0;
        std::uint64_t landing_bytes = 0;
        std::shared_ptr<DeviceMemory> memory, landing;
        std::shared_ptr<RegisteredMemory> stage;

        Pointer base() const { return stage ? stage->pointer() : memory->pointer(); }
        Pointer slot(std::uint64_t seq, std::size_t slots) const { return base() + (seq - 1) % slots * slot_bytes; }
    };

    std::vector<DeviceTensor> announced(const Arrival& arrival) const;
    const Slots* slots_of(const Arrival& arrival, const Parcel& parcel) const;
    Mark& expect(Arrival& arrival, StreamHandle consumer);
    void land(Delivery& delivery, const Slots& slots, StreamHandle consumer);
    void give_back(std::uint64_t seq, StreamHandle consumer) noexcept;
    bool drained() const;
    void grant();
    Slots make_slots(const Board::Want& want, std::uint32_t generation);
    void pass(const std::shared_ptr<Memory>& shared, std::uint32_t generation);
    void release();
    void poison(std::uint64_t place);

    std::shared_ptr<Job> job_;
    std::shared_ptr<Steward> steward_;
    std::shared_ptr<const Context> context_;
    Codec codec_;
    std::shared_ptr<const Board> board_;  // made once the sender has opened the link
    Receiver host_;
    std::unique_ptr<Flags> flags_;
    Kernels kernels_;
    mutable std::mutex mutex_;  // between callers, the threads in which tensors die, and the steward
    std::unique_ptr<Stream> landing_, rescue_;
    std::unique_ptr<Event> landed_;
    Consumers consumers_;
    std::map<std::uint32_t, Slots> slots_;  // by generation
    std::vector<std::uint64_t> taken_;      // by slot: the last message that a stream waits for
    bool closed_ = false;
};

}  // namespace pipekern::cuda
