// The receiving end of a link, and the messages that lie in its slots.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "transport/job.h"
#include "transport/ring.h"

namespace pipekern {

// A message in its slot. The slot's credit returns when the last reference to it goes.
class Arrival {
  public:
    Arrival(std::shared_ptr<const Ring> ring, std::uint64_t seq, std::shared_ptr<Memory> region, std::byte* payload)
        : ring_(std::move(ring)), region_(std::move(region)), payload_(payload), seq_(seq) {}
    ~Arrival() {
        if (!release_ || release_()) ring_->give_credit(seq_);
    }
    Arrival(const Arrival&) = delete;
    Arrival& operator=(const Arrival&) = delete;

    const Header& header() const { return ring_->slot(seq_).header; }
    std::byte* payload() const { return payload_; }
    std::uint64_t seq() const { return seq_; }
    const std::shared_ptr<Memory>& region() const { return region_; }  // that the payload lies in

    // What comes before the credit; false: it gives the credit itself, later. Must not throw.
    void before_credit(std::function<bool()> release) { release_ = std::move(release); }

  private:
    std::shared_ptr<const Ring> ring_;
    std::shared_ptr<Memory> region_;
    std::byte* payload_;
    std::uint64_t seq_;
    std::function<bool()> release_;
};

// What `source` passes of this kind for a link; waits for it.
std::shared_ptr<Memory> await_memory(Job& job, Frame::Kind kind, const LinkName& link, int source);

class Receiver {
  public:
    // Takes the link's control memory from the sender; waits for it. An announced message has come once `landed` says
    // so of its header; without it, at once.
    Receiver(std::shared_ptr<Job> job, LinkName link, int source, std::function<bool(const Header&)> landed = {});

    // Whether the next message is on its way, or there. Raises the job's failure.
    bool announced() const {
        job_->check();
        return ring_->arrived(next_);
    }

    // Whether receive() would not wait. Raises the job's failure.
    bool ready() const;

    // Looks for about a microsecond; what receive() need not wait for is then there.
    bool spin() const;

    // Until the next message is there; false when `limit_ns` has passed (negative: no limit).
    bool wait(std::uint64_t tag, std::int64_t limit_ns);

    // The header of the next message, which must be there.
    const Header& next() const { return ring_->slot(next_).header; }

    // The next message, which must be there and must have this tag.
    std::shared_ptr<Arrival> take(std::uint64_t tag);

    // The messages whose slots are in use, oldest first.
    std::vector<std::shared_ptr<const Arrival>> held() const;
    // Whether the address lies in one of this link's memories that are still in use.
    bool owns(const void* pointer) const;

    const std::shared_ptr<const Ring>& ring() const { return ring_; }
    const LinkName& link() const { return link_; }
    int source() const { return source_; }
    // 1 while this end sleeps until a message comes; who clears it wakes.
    std::atomic<std::uint32_t>& sleeping() const { return ring_->sleeping(); }

  private:
    bool arrived() const { return ring_->arrived(next_) && (!landed_ || landed_(ring_->slot(next_).header)); }
    void check_header(const Header& header, std::uint64_t tag) const;
    void map_generation(std::uint32_t generation);

    std::shared_ptr<Job> job_;
    LinkName link_;
    int source_;
    std::shared_ptr<const Ring> ring_;
    std::function<bool(const Header&)> landed_;
    std::shared_ptr<Memory> region_;
    std::uint32_t generation_ = 0;
    std::uint64_t next_ = 1;
    std::vector<std::weak_ptr<const Arrival>> held_;  // by slot
    std::vector<std::weak_ptr<Memory>> regions_;
    std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
};

}  // namespace pipekern
