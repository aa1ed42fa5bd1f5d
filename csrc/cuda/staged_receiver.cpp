#include "cuda/staged_receiver.h"

#include <chrono>
#include <thread>

namespace pipekern::cuda {
namespace {

constexpr auto kLook = std::chrono::microseconds(100);  // between two looks at a stream that a close waits for

struct Credit {
    std::shared_ptr<const Ring> ring;
    std::uint64_t seq;
};

void give_credit(void* data) {
    const std::unique_ptr<Credit> credit(static_cast<Credit*>(data));
    credit->ring->give_credit(credit->seq);
}

// Where its tensors begin in the payload.
std::size_t tensors_of(const Header& header) { return header.flags & kBundle ? align_up(header.descriptor) : 0; }

}  // namespace

StagedReceiver::StagedReceiver(std::shared_ptr<Job> job, LinkName link, int source,
                               std::shared_ptr<const Context> context)
    : job_(std::move(job)), context_(std::move(context)), host_(job_, std::move(link), source) {
    const Current current(*context_);
    credits_ = std::make_unique<Stream>();
}

std::shared_ptr<Arrival> StagedReceiver::take(std::uint64_t tag, StreamHandle consumer) {
    auto arrival = host_.take(tag);
    if (tensors_of(arrival->header()) >= arrival->header().bytes) return arrival;
    const std::lock_guard lock(mutex_);
    const Current current(*context_);
    consumers_.mark(consumer);
    if (regions_.empty() || regions_.back()->host() != arrival->region())
        regions_.push_back(std::make_unique<RegisteredMemory>(context_, arrival->region()));
    arrival->before_credit(
        [self = shared_from_this(), seq = arrival->seq(), consumer] { return self->give_back(seq, consumer); });
    return arrival;
}

bool StagedReceiver::give_back(std::uint64_t seq, StreamHandle consumer) noexcept {
    if (job_->session()->inherited.load()) return true;
    const std::lock_guard lock(mutex_);
    if (closed_) return true;
    try {
        const Current current(*context_);
        Mark& used = consumers_.mark(consumer);
        used.begin();
        auto credit = std::make_unique<Credit>(Credit{host_.ring(), seq});
        used.end();
        credits_->wait(used.event());
        demand(Driver::get().launch_host(credits_->handle(), give_credit, credit.get()), "a callback in a stream");
        static_cast<void>(credit.release());
        return false;
    } catch (const Failure& failure) {
        job_->abort("rank " + std::to_string(job_->rank()) + " failed, giving a slot of link '" + host_.link().name +
                    "' back: " + failure.what());
        return true;
    }
}

void StagedReceiver::close() {
    if (job_->session()->inherited.load()) return;
    for (bool idle = false; !idle; std::this_thread::sleep_for(kLook)) {
        const std::lock_guard lock(mutex_);
        idle = idle_or_lost(*context_, consumers_) && idle_or_lost(*context_, *credits_);
        if (!idle) continue;
        closed_ = true;
        regions_.clear();
    }
}

}  // namespace pipekern::cuda
