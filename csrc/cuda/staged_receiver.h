// The receiving end of a link from a rank on the CPU to a device. The other end is that of any link through shared
// memory: this side registers its slots, and copies each message at once into memory of the device.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cuda/memory.h"
#include "cuda/stream.h"
#include "transport/receiver.h"

namespace pipekern::cuda {

class StagedReceiver;

// A message of which all but a bundle's descriptor is in memory of the device, at the offsets that it has in its slot.
// The slot is free again when both this and the copy are gone.
struct Landed {
    std::shared_ptr<StagedReceiver> receiver;
    StreamHandle consumer;
    std::shared_ptr<Arrival> arrival;
    std::shared_ptr<DeviceMemory> memory;
    Pointer base = 0;

    ~Landed();
};

class StagedReceiver : public std::enable_shared_from_this<StagedReceiver> {
  public:
    // Takes the link's control memory from the sender; waits for it.
    StagedReceiver(std::shared_ptr<Job> job, LinkName link, int source, std::shared_ptr<const Context> context);

    bool ready() const { return host_.ready(); }
    bool spin() const { return host_.spin(); }
    bool wait(std::uint64_t tag, std::int64_t limit_ns) { return host_.wait(tag, limit_ns); }

    // The next message, which must be there and must have this tag; later work of `consumer` begins when it has landed.
    // Its memory is used again after the work that is in `consumer` when it goes.
    std::shared_ptr<Landed> take(std::uint64_t tag, StreamHandle consumer);

    // The messages that are in use, oldest first.
    std::vector<std::shared_ptr<const Landed>> held() const;
    bool owns(std::uintptr_t pointer) const;

    // Waits for what streams still do with the link, then gives its memory back.
    void close();

  private:
    friend struct Landed;

    void land(Landed& landed);
    Pointer registered(const Arrival& arrival);
    void give_back(std::uint64_t seq, StreamHandle consumer) noexcept;
    bool drained() const;
    std::size_t place(std::uint64_t seq) const { return (seq - 1) % used_.size(); }

    std::shared_ptr<Job> job_;
    std::shared_ptr<const Context> context_;
    Receiver host_;
    mutable std::mutex mutex_;  // between callers and the threads in which tensors die
    std::unique_ptr<Stream> landing_;
    std::unique_ptr<Event> landed_;
    std::vector<Event> used_;  // by slot: the work that may still use the memory of its last message
    std::vector<std::unique_ptr<RegisteredMemory>> regions_;  // outgrown ones may still be read; they are smaller
    std::vector<std::shared_ptr<DeviceMemory>> memories_;     // the same
    std::size_t slot_bytes_ = 0;
    std::vector<std::weak_ptr<const Landed>> held_;  // by slot
    std::uint64_t taken_ = 0;
    bool closed_ = false;
};

}  // namespace pipekern::cuda
