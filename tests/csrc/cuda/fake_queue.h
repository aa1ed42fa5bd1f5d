// Streams of the stand-in driver: threads that do one operation after the other.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

#include "fake_driver.h"

namespace fake {

inline void pause() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

inline void jitter() {
    const int most = knobs().jitter.load();
    if (most == 0) return;
    thread_local std::mt19937 random(std::random_device{}());
    std::this_thread::sleep_for(std::chrono::microseconds(random() % static_cast<unsigned>(most)));
}

class Queue {
  public:
    Queue() : thread_([this] { run(); }) {}
    // Does what is queued first.
    ~Queue() {
        {
            const std::lock_guard lock(mutex_);
            stop_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }

    void add(std::function<void()> operation) {
        {
            const std::lock_guard lock(mutex_);
            operations_.push_back(std::move(operation));
        }
        changed_.notify_all();
    }

  private:
    void run() {
        for (;;) {
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [this] { return stop_ || !operations_.empty(); });
            if (operations_.empty()) return;
            const auto operation = std::move(operations_.front());
            operations_.pop_front();
            lock.unlock();
            jitter();
            operation();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> operations_;
    bool stop_ = false;
    std::thread thread_;
};

// What a record waits for and a query asks. Shared with operations that are still queued when it is destroyed.
struct Moment {
    std::atomic<std::uint64_t> recorded{0}, done{0};
};

struct Event {
    std::shared_ptr<Moment> moment = std::make_shared<Moment>();
};

struct Stream {
    std::shared_ptr<Queue> queue;
    std::shared_ptr<std::atomic<int>> pending = std::make_shared<std::atomic<int>>(0);
    std::atomic<int> asked{0};

    void add(std::function<void()> operation) {
        pending->fetch_add(1);
        queue->add([operation = std::move(operation), left = pending] {
            operation();
            left->fetch_sub(1);
        });
    }
};

}  // namespace fake
