// The knobs and meters of the stand-in driver, for tests that are linked with it. Other processes set the knobs by the
// environment: FAKE_CUDA="devices=2,jitter=200,one_queue=1,no_ipc=1,no_peer=1,no_stream_ops=1,fail=17".
#pragma once

#include <atomic>
#include <string>

#define FAKE_VISIBLE __attribute__((visibility("default")))

namespace fake {

struct Knobs {
    std::atomic<int> devices{1};
    std::atomic<int> jitter{0};         // each operation of a stream is late by up to so many µs
    std::atomic<int> one_queue{0};      // all streams of the process share one queue
    std::atomic<int> no_ipc{0};         // handles are refused
    std::atomic<int> no_peer{0};        // devices do not reach each other
    std::atomic<int> no_stream_ops{0};  // no stream memory operations
    std::atomic<int> fail{0};           // the call of this number, counted from now on, fails; 0: none
};
FAKE_VISIBLE Knobs& knobs();

// How many calls have been made that can fail: neither queries, whose number depends on time, nor what giving back
// takes. Setting it starts `fail` anew.
FAKE_VISIBLE std::atomic<int>& calls();

// How often it has been asked of a stream whether it is through.
FAKE_VISIBLE int asked(const void* stream);

// What has not been given back: "2 streams, 1 allocation"; empty when all has.
FAKE_VISIBLE std::string leaks();

// Of the device's memory.
FAKE_VISIBLE long allocated_bytes();

}  // namespace fake
