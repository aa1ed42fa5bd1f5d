#include "transport/receiver.h"

#include <algorithm>
#include <string>

#include "transport/clock.h"
#include "transport/wait.h"

namespace pipekern {

std::shared_ptr<Memory> await_memory(Job& job, Frame::Kind kind, const LinkName& link, int source) {
    std::shared_ptr<Memory> memory;
    const auto ready = [&] {
        if (!memory) memory = job.exchange().take(source, kind, link.number, 0);
        return memory != nullptr;
    };
    for (Patience patience(job, {Awaited::kLink, source, 0, &link.name}, now_ns());; job.observer().slice()) {
        patience.check(now_ns(), ready);
        if (ready()) break;
        job.exchange().wait(source, 50 * kMillisecond);
    }
    job.page().progress();
    return memory;
}

namespace {

std::shared_ptr<const Ring> take_control(Job& job, const LinkName& link, int source) {
    auto memory = await_memory(job, Frame::kControl, link, source);
    auto ring = std::make_shared<const Ring>(std::move(memory), link.slots, job.session());
    if (!ring->signed_as(link))
        throw Failure(Fault::kTransport, source,
                      "rank " + std::to_string(source) + " opened another link than '" + link.name + "' with " +
                          std::to_string(link.slots) + " slots as number " + std::to_string(link.number) +
                          ": every rank must open the same list of links");
    return ring;
}

// The payload that a tensor's header announces; more than any memory holds where it overflows.
std::uint64_t announced_bytes(const Header& header) {
    unsigned __int128 bytes = kDtypes[header.dtype].bits / 8;
    for (std::size_t dim = 0; dim < header.ndim; ++dim) {
        bytes *= header.shape[dim];
        if (bytes >> 64) return ~std::uint64_t{0};
    }
    return static_cast<std::uint64_t>(bytes);
}

}  // namespace

Receiver::Receiver(std::shared_ptr<Job> job, LinkName link, int source, std::function<bool(const Header&)> landed)
    : job_(std::move(job)),
      link_(std::move(link)),
      source_(source),
      ring_(take_control(*job_, link_, source)),
      landed_(std::move(landed)),
      held_(link_.slots) {}

bool Receiver::ready() const {
    job_->check();
    return arrived();
}

bool Receiver::spin() const {
    return pipekern::spin([this] { return arrived(); });
}

bool Receiver::wait(std::uint64_t tag, std::int64_t limit_ns) {
    const Turn turn(taken_, link_.name);
    const Awaited what{Awaited::kMessage, source_, tag, &link_.name};
    return wait_for(*job_, what, ring_->sleeping(), [this] { return arrived(); }, limit_ns);
}

std::shared_ptr<Arrival> Receiver::take(std::uint64_t tag) {
    const Turn turn(taken_, link_.name);
    job_->check();  // after the message came: once the job has failed, nothing returns data
    const Header& header = ring_->slot(next_).header;
    if (!arrived()) throw Failure(Fault::kTransport, -1, "no message on link '" + link_.name + "'");
    check_header(header, tag);
    if (header.generation != generation_) map_generation(header.generation);
    const std::size_t slot_bytes = region_->size() / link_.slots;
    if (header.bytes > slot_bytes)
        throw Failure(Fault::kTransport, source_, "a message on link '" + link_.name + "' exceeds its slot");
    std::byte* payload = region_->data() + ring_->index(next_) * slot_bytes;
    auto arrival = std::make_shared<Arrival>(ring_, next_, region_, payload);
    held_[ring_->index(next_)] = arrival;
    ++next_;
    job_->page().progress();
    return arrival;
}

void Receiver::check_header(const Header& header, std::uint64_t tag) const {
    const bool sane = header.magic == kMagic && header.version == kVersion && header.dtype < kDtypeCount &&
                      header.ndim <= kMaxDims &&
                      ((header.flags & kBundle)   ? header.descriptor <= header.bytes
                       : (header.flags & kDevice) ? header.bytes == 0
                                                  : announced_bytes(header) == header.bytes);
    if (sane && header.tag == tag) return;
    const std::string place = "link '" + link_.name + "' from rank " + std::to_string(source_);
    if (!sane) throw Failure(Fault::kTransport, source_, "a message on " + place + " has a damaged header");
    throw Failure(Fault::kMismatch, source_,
                  "the message on " + place + " has tag " + std::to_string(header.tag) + ", the program expects " +
                      std::to_string(tag) + ": the two ranks run different programs");
}

void Receiver::map_generation(std::uint32_t generation) {
    // The sender passes a memory before it announces a message in it; one that no message used is skipped.
    std::shared_ptr<Memory> memory;
    while (generation_ != generation)
        memory = job_->exchange().take(source_, Frame::kData, link_.number, ++generation_);
    if (!memory)
        throw Failure(Fault::kTransport, source_, "the memory of a message on link '" + link_.name + "' did not come");
    region_ = memory;
    regions_.erase(std::remove_if(regions_.begin(), regions_.end(), [](const auto& old) { return old.expired(); }),
                   regions_.end());
    regions_.push_back(memory);
}

std::vector<std::shared_ptr<const Arrival>> Receiver::held() const {
    std::vector<std::shared_ptr<const Arrival>> alive;
    for (std::uint64_t i = 0; i < link_.slots; ++i)  // the slot that comes next holds the oldest
        if (auto arrival = held_[ring_->index(next_ + i)].lock()) alive.push_back(std::move(arrival));
    return alive;
}

bool Receiver::owns(const void* pointer) const {
    return std::any_of(regions_.begin(), regions_.end(), [pointer](const auto& region) {
        const auto memory = region.lock();
        return memory && memory->contains(pointer);
    });
}

}  // namespace pipekern
