#include "cuda/steward.h"

#include <signal.h>

#include <algorithm>

#include "transport/futex.h"

namespace pipekern::cuda {
namespace {

constexpr std::int64_t kRound = 100 * kMillisecond;

}  // namespace

Steward::Steward(std::shared_ptr<Job> job)
    // In a forked child the thread is not there; destroying it would end the process.
    : job_(std::move(job)), guard_([this] { static_cast<void>(thread_.release()); }) {
    // Signals are Python's main thread's.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::make_unique<std::thread>([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Steward::~Steward() {
    if (!thread_) return;
    stop_.store(true);
    ring(job_->rank());
    thread_->join();
}

void Steward::add(Ward& ward) {
    const std::lock_guard lock(mutex_);
    wards_.push_back(&ward);
}

void Steward::remove(Ward& ward) {
    const std::lock_guard lock(mutex_);
    wards_.erase(std::remove(wards_.begin(), wards_.end(), &ward), wards_.end());
}

void Steward::ring(int rank) const {
    std::atomic<std::uint32_t>& bell = job_->page().bell(rank);
    bell.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(bell);
}

void Steward::lend(std::uint32_t number, std::shared_ptr<const Board> board) {
    const std::lock_guard lock(mutex_);
    lent_[number] = std::move(board);
}

std::shared_ptr<const Board> Steward::borrow(std::uint32_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = lent_.find(number);
    if (found == lent_.end())
        throw Failure(Fault::kTransport, job_->rank(), "a link within a process opens its sending end first");
    auto board = std::move(found->second);
    lent_.erase(found);
    return board;
}

void Steward::run() {
    std::atomic<std::uint32_t>& bell = job_->page().bell(job_->rank());
    while (!stop_.load()) {
        const std::uint32_t heard = bell.load(std::memory_order_seq_cst);
        {
            const std::lock_guard lock(mutex_);
            for (Ward* ward : wards_) ward->tend();
        }
        if (!stop_.load()) futex_wait(bell, heard, job_->page().aborted() ? kMillisecond : kRound);
    }
}

}  // namespace pipekern::cuda
