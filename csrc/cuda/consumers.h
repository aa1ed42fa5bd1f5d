// The streams that use what a link brings, and how far they have come with it.
#pragma once

#include <algorithm>
#include <map>

#include "cuda/stream.h"

namespace pipekern::cuda {

// What a link has to wait for in a stream. Work is queued between begin() and end(), which records an event. Where that
// could not be, the stream itself is asked: the work is there all the same, and what it uses must outlive it.
class Mark {
  public:
    explicit Mark(StreamHandle stream) : stream_(stream) {}

    const Event& event() const { return event_; }
    void begin() { ended_ = false; }
    void end() {
        event_.record(stream_);
        ended_ = true;
    }
    bool passed() const { return ended_ ? event_.passed() : is_idle(stream_); }

  private:
    StreamHandle stream_;
    Event event_;
    bool ended_ = true;
};

// All calls in the context of the link.
class Consumers {
  public:
    Mark& mark(StreamHandle stream) { return marks_.try_emplace(stream, stream).first->second; }
    bool idle() const {
        return std::all_of(marks_.begin(), marks_.end(), [](const auto& entry) { return entry.second.passed(); });
    }

  private:
    std::map<StreamHandle, Mark> marks_;
};

}  // namespace pipekern::cuda
