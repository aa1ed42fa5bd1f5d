// The sending end of a link from a device to a rank on the CPU. The other end is that of any link through shared
// memory: copies go straight into its slots, which this side registers, and the stream announces them when they are
// through.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cuda/copies.h"
#include "cuda/memory.h"
#include "transport/sender.h"

namespace pipekern::cuda {

class StagedSender {
  public:
    StagedSender(std::shared_ptr<Job> job, LinkName link, int target, std::shared_ptr<const Context> context);

    // Whether send() would find a slot; a refusal counts as waiting for one. Raises the job's failure.
    bool free(std::uint64_t tag) { return host_.free(tag); }

    // Copies the pieces into the next slot; false at once when it is not free. Those without data are `tensors` of the
    // device, in their order, copied after what `producer` has queued by now. They must stay until they have been read,
    // see reap(); with `given`, later work of `producer` must not change them before, else it is made to wait.
    bool send(const Label& label, const std::vector<Piece>& pieces, const std::vector<Pointer>& tensors,
              StreamHandle producer, bool given);

    // How many of the messages with tensors have been read, in the order in which they were sent.
    std::uint64_t reap();

    // Waits for what is on its way.
    void close();

  private:
    void enqueue(std::byte* payload, const std::vector<Piece>& pieces, const std::vector<Pointer>& tensors,
                 StreamHandle producer, bool given);
    void announce_behind_copies();
    Pointer registered(const std::byte* place);

    std::shared_ptr<Job> job_;
    std::shared_ptr<const Context> context_;
    Sender host_;
    std::mutex mutex_;  // between a caller and one that closes
    std::unique_ptr<Copies> copies_;
    std::vector<std::unique_ptr<RegisteredMemory>> regions_;  // outgrown ones may still be written; they are smaller
};

}  // namespace pipekern::cuda
