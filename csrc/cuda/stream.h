// A stream and an event that belong to this process and destroy themselves. Contexts outlive them.
#pragma once

#include <utility>

#include "cuda/context.h"
#include "transport/error.h"

namespace pipekern::cuda {

class Event {
  public:
    Event() { demand(Driver::get().event_create(&handle_, kEventDisableTiming), "a new event"); }
    ~Event() {
        const Driver* driver = Driver::alive();
        if (handle_ && driver) driver->event_destroy(handle_);
    }
    Event(Event&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Event& operator=(Event&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }

    EventHandle handle() const { return handle_; }
    void record(StreamHandle stream) { demand(Driver::get().event_record(handle_, stream), "recording an event"); }
    // Whether all work before the last record has been done.
    bool passed() const {
        const int result = Driver::get().event_query(handle_);
        if (result == kNotReady) return false;
        demand(result, "earlier work on a stream");
        return true;
    }

  private:
    EventHandle handle_ = nullptr;
};

// Whether all work of a stream of the current context has been done.
inline bool is_idle(StreamHandle stream) {
    const int result = Driver::get().stream_query(stream);
    if (result == kNotReady) return false;
    demand(result, "earlier work on a stream");
    return true;
}

// Does not wait for the legacy default stream, nor it for this one. Made in the current context.
class Stream {
  public:
    Stream() { demand(Driver::get().stream_create(&handle_, kStreamNonBlocking), "a new stream"); }
    ~Stream() {
        if (const Driver* driver = Driver::alive()) driver->stream_destroy(handle_);
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    StreamHandle handle() const { return handle_; }
    void wait(const Event& event) {
        demand(Driver::get().stream_wait_event(handle_, event.handle(), 0), "waiting for an event");
    }
    bool idle() const { return is_idle(handle_); }

  private:
    StreamHandle handle_ = nullptr;
};

// Whether nothing runs on `work` (a Stream, Copies) any more: it is through, or its device has failed.
template <class Work>
bool idle_or_lost(const Context& context, const Work& work) {
    try {
        const Current current(context);
        return work.idle();
    } catch (const Failure&) {
        return true;
    }
}

}  // namespace pipekern::cuda
