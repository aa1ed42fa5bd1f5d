// How a receiver makes the slots that its sender asks for; the steward's thread does it.
#include <cstring>

#include "cuda/receiver.h"
#include "transport/clock.h"
#include "transport/futex.h"

namespace pipekern::cuda {

// Answers the sender's latest request.
void DeviceReceiver::grant() {
    const std::uint32_t generation = board_->wanted().load(std::memory_order_seq_cst);
    if (generation == board_->granted().load(std::memory_order_relaxed)) return;
    Board::Grant& answer = board_->grant();
    answer = {};
    try {
        Slots slots = make_slots(board_->want(), generation);
        answer.address = slots.base();
        if (slots.way == Way::kIpc) answer.handle = slots.memory->export_handle();
        const std::lock_guard lock(mutex_);
        slots_[generation] = std::move(slots);
    } catch (const Failure& failure) {
        std::strncpy(answer.refusal, failure.what(), sizeof answer.refusal - 1);
    }
    board_->granted().store(generation, std::memory_order_seq_cst);
    if (board_->asking().exchange(0) != 0) futex_wake(board_->asking());
}

DeviceReceiver::Slots DeviceReceiver::make_slots(const Board::Want& want, std::uint32_t generation) {
    Slots slots;
    slots.way = want.way;
    slots.slot_bytes = want.slot_bytes;
    slots.landing_bytes = want.landing_bytes;
    const std::size_t count = taken_.size();
    if (want.landing_bytes)
        slots.landing = std::make_shared<DeviceMemory>(context_, count * want.landing_bytes, std::uint8_t{0});
    if (want.way != Way::kStaged) {
        const std::string unreachable = want.way == Way::kLocal ? Context(want.device).reach(*context_) : "";
        if (!unreachable.empty()) throw Failure(Fault::kTransport, -1, unreachable);
        slots.memory = std::make_shared<DeviceMemory>(context_, count * want.slot_bytes, std::uint8_t{0});
        return slots;
    }
    auto shared = Memory::create(count * want.slot_bytes);
    if (host_.source() != job_->rank()) pass(shared, generation);
    shared->drop_fd();
    slots.stage = std::make_shared<RegisteredMemory>(context_, std::move(shared));
    return slots;
}

void DeviceReceiver::pass(const std::shared_ptr<Memory>& shared, std::uint32_t generation) {
    const int peer = host_.source();
    // As Job::pass, which tells the observer: that is not for this thread.
    while (!job_->exchange().pass(peer, {Frame::kStage, host_.link().number, generation, kVersion, shared->size()},
                                  shared)) {
        job_->check();
        job_->exchange().absorb(peer);
        job_->exchange().wait(peer, kMillisecond);
    }
}

}  // namespace pipekern::cuda
