#include "cuda/staged_sender.h"

#include <chrono>
#include <thread>

namespace pipekern::cuda {
namespace {

constexpr auto kLook = std::chrono::microseconds(100);  // between two looks at a stream that a close waits for

struct Announcement {
    Ring ring;
    std::uint64_t seq;
};

void announce(void* data) {
    const std::unique_ptr<Announcement> announcement(static_cast<Announcement*>(data));
    announcement->ring.announce(announcement->seq);
}

}  // namespace

StagedSender::StagedSender(std::shared_ptr<Job> job, LinkName link, int target, std::shared_ptr<const Context> context)
    : job_(std::move(job)), context_(std::move(context)), host_(job_, std::move(link), target) {
    const Current current(*context_);
    copies_ = std::make_unique<Copies>();
}

bool StagedSender::send(const Label& label, const std::vector<Piece>& pieces, const std::vector<Pointer>& tensors,
                        StreamHandle producer, bool given) {
    const std::lock_guard lock(mutex_);
    return host_.send(label, pieces.data(), pieces.size(), [&](std::byte* payload) {
        const Current current(*context_);
        if (tensors.empty() && copies_->idle()) return true;
        if (!tensors.empty()) enqueue(payload, pieces, tensors, producer, given);
        announce_behind_copies();
        return false;
    });
}

void StagedSender::enqueue(std::byte* payload, const std::vector<Piece>& pieces, const std::vector<Pointer>& tensors,
                           StreamHandle producer, bool given) {
    const Pointer slot = registered(payload);
    copies_->begin(producer);
    std::size_t offset = 0;
    auto tensor = tensors.begin();
    for (const Piece& piece : pieces) {
        offset = align_up(offset);
        if (!piece.data) {
            const Pointer source = *tensor++;
            if (piece.bytes)
                demand(Driver::get().copy(slot + offset, source, piece.bytes, copies_->handle()), "a copy to the host");
        }
        offset += piece.bytes;
    }
    copies_->end(producer, given);
}

void StagedSender::announce_behind_copies() {
    auto announcement = std::make_unique<Announcement>(Announcement{host_.ring(), host_.next()});
    demand(Driver::get().launch_host(copies_->handle(), announce, announcement.get()), "a callback in a stream");
    static_cast<void>(announcement.release());
}

Pointer StagedSender::registered(const std::byte* place) {
    if (regions_.empty() || regions_.back()->host() != host_.region())
        regions_.push_back(std::make_unique<RegisteredMemory>(context_, host_.region()));
    return regions_.back()->pointer_to(place);
}

std::uint64_t StagedSender::reap() {
    const std::lock_guard lock(mutex_);
    const Current current(*context_);
    return copies_->reap();
}

void StagedSender::close() {
    if (job_->session()->inherited.load()) return;
    for (bool idle = false; !idle; std::this_thread::sleep_for(kLook)) {
        const std::lock_guard lock(mutex_);
        idle = idle_or_lost(*context_, *copies_);
        if (idle) regions_.clear();
    }
}

}  // namespace pipekern::cuda
