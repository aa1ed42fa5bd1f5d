// The thread that serves a rank's CUDA links: it gives senders the slots they ask for, lets go what a failed job has
// left parked, and closes what a closing peer wants back. It never needs Python's lock.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/board.h"
#include "transport/fork.h"
#include "transport/job.h"

namespace pipekern::cuda {

// An end of a link, as the steward sees it.
struct Ward {
    virtual ~Ward() = default;
    // Called whenever somebody rings, and every 100 ms (every millisecond once the job has failed). Must not throw.
    virtual void tend() = 0;
};

class Steward {
  public:
    explicit Steward(std::shared_ptr<Job> job);
    ~Steward();  // stops and joins
    Steward(const Steward&) = delete;
    Steward& operator=(const Steward&) = delete;

    void add(Ward& ward);
    void remove(Ward& ward);  // returns when it is not being tended

    // Wakes the steward of `rank`.
    void ring(int rank) const;

    // The board of a link within this process goes from its sender to its receiver by number.
    void lend(std::uint32_t number, std::shared_ptr<const Board> board);
    std::shared_ptr<const Board> borrow(std::uint32_t number);

  private:
    void run();

    std::shared_ptr<Job> job_;
    std::mutex mutex_;
    std::vector<Ward*> wards_;
    std::map<std::uint32_t, std::shared_ptr<const Board>> lent_;
    std::atomic<bool> stop_{false};
    std::unique_ptr<std::thread> thread_;
    ForkGuard guard_;
};

}  // namespace pipekern::cuda
