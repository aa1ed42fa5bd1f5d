// The receiving end of a link from a rank on the CPU to one on a device. The other end is that of any link through
// shared memory, and so is what arrives: tensors of the CPU, in slots that this side registers, so that a stream copies
// out of them without anybody's waiting.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cuda/consumers.h"
#include "cuda/memory.h"
#include "transport/receiver.h"

namespace pipekern::cuda {

class StagedReceiver : public std::enable_shared_from_this<StagedReceiver> {
  public:
    // Takes the link's control memory from the sender; waits for it.
    StagedReceiver(std::shared_ptr<Job> job, LinkName link, int source, std::shared_ptr<const Context> context);

    bool ready() const { return host_.ready(); }
    bool spin() const { return host_.spin(); }
    bool wait(std::uint64_t tag, std::int64_t limit_ns) { return host_.wait(tag, limit_ns); }

    // The next message, which must be there and must have this tag. Its slot is free again after the work that is in
    // `consumer` when the arrival goes.
    std::shared_ptr<Arrival> take(std::uint64_t tag, StreamHandle consumer);

    std::vector<std::shared_ptr<const Arrival>> held() const { return host_.held(); }
    bool owns(const void* pointer) const { return host_.owns(pointer); }

    // Waits for the streams that still read, then lets the slots go.
    void close();

  private:
    bool give_back(std::uint64_t seq, StreamHandle consumer) noexcept;

    std::shared_ptr<Job> job_;
    std::shared_ptr<const Context> context_;
    Receiver host_;
    std::mutex mutex_;                 // between callers and the threads in which tensors die
    std::unique_ptr<Stream> credits_;  // gives them, so that no consumer waits for a callback
    Consumers consumers_;
    std::vector<std::unique_ptr<RegisteredMemory>> regions_;  // outgrown ones may still be read; they are smaller
    bool closed_ = false;
};

}  // namespace pipekern::cuda
