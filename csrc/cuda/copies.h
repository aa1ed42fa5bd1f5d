// The stream of a link's sending end, and which messages it has read.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "cuda/stream.h"

namespace pipekern::cuda {

// All calls in the context that it was made in.
class Copies {
  public:
    StreamHandle handle() const { return stream_.handle(); }

    // Later copies come after what `producer` has queued.
    void begin(StreamHandle producer) {
        ready_.record(producer);
        stream_.wait(ready_);
    }

    // A message has been queued. Unless its tensors are `given`, later work of `producer` begins when they are read.
    void end(StreamHandle producer, bool given) {
        Event read;
        if (!spare_.empty()) {
            read = std::move(spare_.back());
            spare_.pop_back();
        }
        read.record(handle());
        if (!given) demand(Driver::get().stream_wait_event(producer, read.handle(), 0), "waiting for an event");
        in_flight_.push_back(std::move(read));
    }

    // How many messages have been read, in the order in which they were queued.
    std::uint64_t reap() {
        for (; !in_flight_.empty() && in_flight_.front().passed(); ++read_) {
            spare_.push_back(std::move(in_flight_.front()));
            in_flight_.pop_front();
        }
        return read_;
    }

    bool idle() const { return stream_.idle(); }

  private:
    Stream stream_;
    Event ready_;
    std::vector<Event> spare_;
    std::deque<Event> in_flight_;
    std::uint64_t read_ = 0;
};

}  // namespace pipekern::cuda
