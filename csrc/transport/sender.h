// The sending end of a link.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "transport/job.h"
#include "transport/ring.h"

namespace pipekern {

struct Piece {
    const void* data;  // nullptr: its place in the slot is left as it is
    std::size_t bytes;
};

// What the header says of a message, beside its bytes and its place.
struct Label {
    std::uint64_t tag = 0;
    std::uint64_t digest = 0;
    std::uint8_t dtype = 0;
    std::uint8_t ndim = 0;
    std::uint8_t flags = 0;
    std::uint32_t shape[kMaxDims] = {};
    std::uint32_t descriptor = 0;
};

class Sender {
  public:
    // Makes the link's control memory and passes it to the receiver.
    Sender(std::shared_ptr<Job> job, LinkName link, int target);

    // Whether send() would find a slot; a refusal counts as waiting for one. Raises the job's failure.
    bool free(std::uint64_t tag);

    // Copies the pieces, each at a multiple of 64 bytes, into the next slot; false at once when it is not free.
    // `beside` is called with the slot's payload when the message is sure to go and before it is announced; where it
    // returns false it sees to it that the message next() is announced later.
    bool send(const Label& label, const Piece* pieces, std::size_t count,
              const std::function<bool(std::byte*)>& beside = {});

    // Says that this rank waits for a slot; returns false. Raises PeerDied where the receiver has closed.
    bool refuse(std::uint64_t tag);

    const LinkName& link() const { return link_; }
    int target() const { return target_; }
    const Ring& ring() const { return ring_; }
    const std::shared_ptr<Memory>& region() const { return region_; }  // that the next message lies in
    std::uint64_t next() const { return next_; }                       // the number of the message that comes next

  private:
    bool grow(std::size_t bytes);
    void fill_header(const Label& label, std::size_t bytes);

    std::shared_ptr<Job> job_;
    LinkName link_;
    int target_;
    Ring ring_;
    std::shared_ptr<Memory> region_;  // the slots' payloads; a larger one takes its place when a message does not fit
    std::size_t slot_bytes_ = 0;
    std::uint32_t generation_ = 0;
    std::uint64_t next_ = 1;
    std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
};

}  // namespace pipekern
