#include "cuda/staged_receiver.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace pipekern::cuda {
namespace {

constexpr auto kLook = std::chrono::microseconds(100);  // between two looks at a stream that a close waits for

void let_go(void* data) { delete static_cast<std::shared_ptr<Arrival>*>(data); }

}  // namespace

Landed::~Landed() {
    if (memory) receiver->give_back(arrival->seq(), consumer);
}

StagedReceiver::StagedReceiver(std::shared_ptr<Job> job, LinkName link, int source,
                               std::shared_ptr<const Context> context)
    : job_(std::move(job)), context_(std::move(context)), host_(job_, link, source), held_(link.slots) {
    const Current current(*context_);
    landing_ = std::make_unique<Stream>();
    landed_ = std::make_unique<Event>();
    for (std::uint64_t i = 0; i < link.slots; ++i) used_.emplace_back();
}

std::shared_ptr<Landed> StagedReceiver::take(std::uint64_t tag, StreamHandle consumer) {
    const auto landed = std::make_shared<Landed>();
    landed->receiver = shared_from_this();
    landed->consumer = consumer;
    landed->arrival = host_.take(tag);
    const std::lock_guard lock(mutex_);
    taken_ = landed->arrival->seq();
    held_[place(taken_)] = landed;
    land(*landed);
    return landed;
}

void StagedReceiver::land(Landed& landed) {
    const Header& header = landed.arrival->header();
    const std::size_t start = header.flags & kBundle ? align_up(header.descriptor) : 0;
    if (start >= header.bytes) return;
    const Current current(*context_);
    if (header.bytes > slot_bytes_) {
        slot_bytes_ = align_up(std::max<std::size_t>(header.bytes, 2 * slot_bytes_), 4096);
        memories_.push_back(std::make_shared<DeviceMemory>(context_, used_.size() * slot_bytes_, std::uint8_t{0}));
    }
    landed.memory = memories_.back();
    landed.base = landed.memory->pointer() + place(taken_) * slot_bytes_;

    const Driver& driver = Driver::get();
    const StreamHandle stream = landing_->handle();
    landing_->wait(used_[place(taken_)]);
    demand(driver.copy(landed.base + start, registered(*landed.arrival) + start, header.bytes - start, stream),
           "a copy from the host");
    landed_->record(stream);
    demand(driver.stream_wait_event(landed.consumer, landed_->handle(), 0), "waiting for an event");
    auto read = std::make_unique<std::shared_ptr<Arrival>>(landed.arrival);
    demand(driver.launch_host(stream, let_go, read.get()), "a callback in a stream");
    static_cast<void>(read.release());
}

// Where the device sees the message.
Pointer StagedReceiver::registered(const Arrival& arrival) {
    if (regions_.empty() || regions_.back()->host() != arrival.region())
        regions_.push_back(std::make_unique<RegisteredMemory>(context_, arrival.region()));
    return regions_.back()->pointer_to(arrival.payload());
}

void StagedReceiver::give_back(std::uint64_t seq, StreamHandle consumer) noexcept {
    if (job_->session()->inherited.load()) return;
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    try {
        const Current current(*context_);
        used_[place(seq)].record(consumer);
    } catch (const Failure& failure) {
        job_->abort("rank " + std::to_string(job_->rank()) + " failed, giving a slot of link '" + host_.link().name +
                    "' back: " + failure.what());
    }
}

std::vector<std::shared_ptr<const Landed>> StagedReceiver::held() const {
    std::vector<std::shared_ptr<const Landed>> alive;  // outlives the lock: the last one to go gives its memory back
    const std::lock_guard lock(mutex_);
    for (std::uint64_t i = 0; i < held_.size(); ++i)  // the slot that comes next holds the oldest
        if (auto landed = held_[(taken_ + i) % held_.size()].lock()) alive.push_back(std::move(landed));
    return alive;
}

bool StagedReceiver::owns(std::uintptr_t pointer) const {
    const auto alive = held();
    return std::any_of(alive.begin(), alive.end(), [pointer](const auto& landed) {
        const DeviceMemory* memory = landed->memory.get();
        return memory && pointer >= memory->pointer() && pointer < memory->pointer() + memory->size();
    });
}

// Whether streams are through with the link.
bool StagedReceiver::drained() const {
    try {
        const Current current(*context_);
        return landing_->idle() &&
               std::all_of(used_.begin(), used_.end(), [](const Event& use) { return use.passed(); });
    } catch (const Failure&) {  // the device has failed: nothing runs on it any more
        return true;
    }
}

void StagedReceiver::close() {
    if (job_->session()->inherited.load()) return;
    for (bool through = false; !through; std::this_thread::sleep_for(kLook)) {
        const std::lock_guard lock(mutex_);
        through = drained();
        if (!through) continue;
        closed_ = true;
        regions_.clear();
        memories_.clear();
    }
}

}  // namespace pipekern::cuda
