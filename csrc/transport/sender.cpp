#include "transport/sender.h"

#include <cstring>

#include "transport/clock.h"
#include "transport/socket.h"

namespace pipekern {
namespace {

Ring open_ring(Job& job, const LinkName& link, int target) {
    job.check();
    auto memory = Memory::create(Ring::size(link.slots));
    Ring ring(memory, link.slots, job.session());
    ring.sign(link);
    job.pass(target, {Frame::kControl, link.number, 0, kVersion, memory->size()}, memory);
    memory->drop_fd();
    return ring;
}

// The next power of two, so that messages that grow step by step do not bring a new memory each. What is not written
// takes no room.
std::size_t slot_size(std::size_t bytes) {
    std::size_t size = 4096;
    while (size < bytes) size *= 2;
    return size;
}

}  // namespace

Sender::Sender(std::shared_ptr<Job> job, LinkName link, int target)
    : job_(std::move(job)), link_(std::move(link)), target_(target), ring_(open_ring(*job_, link_, target)) {}

bool Sender::free(std::uint64_t tag) {
    job_->check();
    return ring_.has_credit(next_) || refuse(tag);
}

bool Sender::send(const Label& label, const Piece* pieces, std::size_t count,
                  const std::function<bool(std::byte*)>& beside) {
    const Turn turn(taken_, link_.name);
    if (!free(label.tag)) return false;
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < count; ++i) bytes = align_up(bytes) + pieces[i].bytes;
    if ((bytes > slot_bytes_ || !region_) && !grow(bytes)) return refuse(label.tag);

    std::byte* payload = region_->data() + ring_.index(next_) * slot_bytes_;
    std::size_t offset = 0;
    for (std::size_t i = 0; i < count; ++i) {
        offset = align_up(offset);
        if (pieces[i].bytes && pieces[i].data) std::memcpy(payload + offset, pieces[i].data, pieces[i].bytes);
        offset += pieces[i].bytes;
    }
    fill_header(label, bytes);
    const bool whole = !beside || beside(payload);
    const std::uint64_t seq = next_++;
    if (whole) ring_.announce(seq);
    job_->page().progress();
    return true;
}

bool Sender::refuse(std::uint64_t tag) {
    const Awaited slot{Awaited::kSlot, target_, tag, &link_.name};
    if (job_->has_closed(target_)) job_->fail_closed(slot);
    job_->page().stalled(slot, now_ns());
    return false;
}

// False when the new memory cannot be passed yet.
bool Sender::grow(std::size_t bytes) {
    const std::size_t slot_bytes = slot_size(bytes);
    auto memory = Memory::create(slot_bytes * link_.slots);
    const Frame frame{Frame::kData, link_.number, generation_ + 1, kVersion, memory->size()};
    if (!job_->exchange().pass(target_, frame, memory)) return false;
    memory->drop_fd();
    region_ = std::move(memory);  // the receiver keeps the old one as long as it reads there
    slot_bytes_ = slot_bytes;
    ++generation_;
    return true;
}

void Sender::fill_header(const Label& label, std::size_t bytes) {
    Header& header = ring_.slot(next_).header;
    header.magic = kMagic;
    header.version = kVersion;
    header.dtype = label.dtype;
    header.ndim = label.ndim;
    header.flags = label.flags;
    header.tag = label.tag;
    header.bytes = bytes;
    header.digest = label.digest;
    std::memcpy(header.shape, label.shape, sizeof header.shape);
    header.generation = generation_;
    header.descriptor = label.descriptor;
}

}  // namespace pipekern
