// The sending end of a link between devices. The ring says what has been queued, as between processes of the CPU;
// flags that streams write and wait for say what has happened.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/copies.h"
#include "cuda/flags.h"
#include "cuda/kernels.h"
#include "cuda/parcel.h"
#include "cuda/steward.h"
#include "transport/sender.h"

namespace pipekern::cuda {

class DeviceSender : public Ward {
  public:
    // Makes the link's control memory and board and passes them to the receiver. `wait_on_host`: as where the device
    // has no stream memory operations.
    DeviceSender(std::shared_ptr<Job> job, std::shared_ptr<Steward> steward, LinkName link, int target, Codec codec,
                 std::shared_ptr<const Context> context, bool wait_on_host);
    ~DeviceSender() override;

    // Whether send() would find a slot; a refusal counts as waiting for one. Raises the job's failure.
    bool free(std::uint64_t tag);

    // Queues the tensors' way into the next slot after what `producer` has queued by now, copies the pieces, and
    // announces the message; false at once when no slot is free. The first messages wait for the receiver's steward to
    // make slots. The tensors must stay until they have been read, see reap(); with `given`, later work of `producer`
    // must not change them before, else it is made to wait.
    bool send(Label label, std::vector<Piece> pieces, const std::vector<DeviceTensor>& tensors, StreamHandle producer,
              bool given);

    // How many of the messages with tensors have been read, in the order in which they were sent.
    std::uint64_t reap();

    // "ipc", "staged: the reason", ...; empty before the first tensor.
    std::string way() const;

    // Waits for what is on its way, then gives back the receiver's memory.
    void close();

    void tend() override;

  private:
    struct Slots {
        Way way = Way::kNone;
        Pointer base = 0;
        std::uint64_t slot_bytes = 0;
        std::uint64_t landing_bytes = 0;
        std::shared_ptr<void> owner;
    };

    void provide(const Parcel& parcel, std::uint64_t tag);
    bool fits(const Parcel& parcel) const;
    std::string ask(Way way, const Parcel& parcel, std::uint64_t tag);
    void import_slots(Slots& slots);
    void enqueue(const Parcel& parcel, const std::vector<DeviceTensor>& tensors, StreamHandle producer, bool given);
    void end();

    std::shared_ptr<Job> job_;
    std::shared_ptr<Steward> steward_;
    std::shared_ptr<const Context> context_;
    Codec codec_;
    Sender host_;
    std::shared_ptr<const Board> board_;
    Flags flags_;
    Kernels kernels_;
    mutable std::mutex mutex_;  // between the caller and the steward
    std::unique_ptr<Copies> copies_;
    std::vector<std::uint64_t> used_;  // by slot: the last message whose tensors lay in it
    Slots slots_;
    std::vector<std::shared_ptr<void>> outgrown_;  // may still be read by messages on their way
    std::uint32_t generation_ = 0;
    std::string detour_;  // why the way is not the straight one
    bool ended_ = false;
};

}  // namespace pipekern::cuda
