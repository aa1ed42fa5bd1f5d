// What must happen in a child that forks off (a data-loader worker, say): it is no rank, and must not look like one.
#pragma once

#include <functional>
#include <mutex>

namespace pipekern {

// While it lives, every fork() of this process runs `in_child` in the child, before fork() returns there.
class ForkGuard {
  public:
    explicit ForkGuard(std::function<void()> in_child);
    ~ForkGuard();
    ForkGuard(const ForkGuard&) = delete;
    ForkGuard& operator=(const ForkGuard&) = delete;

    void run() const { in_child_(); }

  private:
    std::function<void()> in_child_;
};

// While it lives, no fork() of this process goes on: for the moments between opening a descriptor and keeping it where
// a guard finds it.
class ForkPause {
  public:
    ForkPause();

  private:
    std::unique_lock<std::mutex> lock_;
};

}  // namespace pipekern
