#include "cuda/receiver.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "transport/clock.h"

namespace pipekern::cuda {
namespace {

constexpr std::int64_t kLetGo = 2 * kSecond;            // for a sender to let go of a closing receiver's memory
constexpr auto kLook = std::chrono::microseconds(100);  // between two looks at a stream that a close waits for
constexpr std::int64_t kPoisoning = kSecond / 5;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point type

std::shared_ptr<const Board> take_board(Job& job, Steward& steward, const LinkName& link, int source,
                                        std::shared_ptr<const Context> context) {
    if (source == job.rank()) return steward.borrow(link.number);
    auto memory = await_memory(job, Frame::kBoard, link, source);
    if (memory->size() != Board::size(link.slots))
        throw Failure(Fault::kTransport, source, "the board of link '" + link.name + "' has a wrong size");
    return std::make_shared<const Board>(std::move(context), std::move(memory), link.slots);
}

}  // namespace

DeviceReceiver::DeviceReceiver(std::shared_ptr<Job> job, std::shared_ptr<Steward> steward, LinkName link, int source,
                               Codec codec, std::shared_ptr<const Context> context, bool wait_on_host)
    : job_(std::move(job)),
      steward_(std::move(steward)),
      context_(std::move(context)),
      codec_(codec),
      host_(job_, link, source,
            [this](const Header& header) {
                const std::uint64_t seq = header.seq.load();
                return flags_->by_streams() || !(header.flags & kDevice) || board_->lane(seq).data.load() >= seq;
            }),
      kernels_(context_),
      taken_(link.slots) {
    board_ = take_board(*job_, *steward_, link, source, context_);
    flags_ = std::make_unique<Flags>(board_, !wait_on_host && context_->has_stream_memory_ops());
    const Current current(*context_);
    landing_ = std::make_unique<Stream>();
    rescue_ = std::make_unique<Stream>();
    landed_ = std::make_unique<Event>();
    steward_->add(*this);
}

DeviceReceiver::~DeviceReceiver() { steward_->remove(*this); }

Delivery DeviceReceiver::take(std::uint64_t tag, StreamHandle consumer) {
    Delivery delivery;
    delivery.arrival = host_.take(tag);
    const Arrival& arrival = *delivery.arrival;
    if (!(arrival.header().flags & kDevice)) return delivery;
    delivery.parcel = lay_out(announced(arrival), codec_);

    const std::lock_guard lock(mutex_);
    const Current current(*context_);
    Mark& mark = expect(*delivery.arrival, consumer);
    const Slots* slots = slots_of(arrival, delivery.parcel);
    if (slots && (slots->way == Way::kStaged || delivery.parcel.casts)) {
        land(delivery, *slots, consumer);
    } else {
        flags_->wait(consumer, board_->lane(arrival.seq()).data, arrival.seq());
        if (slots) delivery.base = slots->slot(arrival.seq(), taken_.size());
        if (slots) delivery.memory = slots->memory;
    }
    mark.end();
    return delivery;
}

// From now on `consumer` waits for the message, and its credit comes after the work there.
Mark& DeviceReceiver::expect(Arrival& arrival, StreamHandle consumer) {
    const std::uint64_t seq = arrival.seq();
    arrival.before_credit([self = shared_from_this(), seq, consumer] {
        self->give_back(seq, consumer);
        return true;
    });
    taken_[(seq - 1) % taken_.size()] = seq;
    Mark& mark = consumers_.mark(consumer);
    mark.begin();
    return mark;
}

// What the header or the table after the descriptor says of the message's tensors.
std::vector<DeviceTensor> DeviceReceiver::announced(const Arrival& arrival) const {
    const Header& header = arrival.header();
    std::vector<DeviceTensor> tensors;
    if (!(header.flags & kBundle)) {
        std::uint64_t elements = 1;
        for (std::size_t dim = 0; dim < header.ndim; ++dim) elements *= header.shape[dim];
        tensors.push_back({0, elements, header.dtype});
        return tensors;
    }
    const std::size_t start = align_up(header.descriptor);
    std::uint64_t words[2];
    const auto read = [&](std::size_t offset, std::size_t bytes) {
        if (offset > header.bytes || bytes > header.bytes - offset)
            throw Failure(Fault::kTransport, host_.source(), "a message's table of tensors is damaged");
        std::memcpy(words, arrival.payload() + offset, bytes);
    };
    read(start, sizeof *words);
    for (std::uint64_t i = 0, count = words[0]; i < count; ++i) {
        read(start + 8 + 16 * i, sizeof words);
        if (words[0] >= kDtypeCount || words[1] >> 48) words[0] = kDtypeCount;
        if (words[0] == kDtypeCount)
            throw Failure(Fault::kTransport, host_.source(), "a message's table of tensors is damaged");
        tensors.push_back({0, words[1], static_cast<std::uint8_t>(words[0])});
    }
    return tensors;
}

// Those that the message lies in; nothing for one that takes no memory.
const DeviceReceiver::Slots* DeviceReceiver::slots_of(const Arrival& arrival, const Parcel& parcel) const {
    if (parcel.bytes == 0) return nullptr;
    const auto found = slots_.find(board_->lane(arrival.seq()).generation);
    const bool known = found != slots_.end();
    const bool lands = known && (found->second.way == Way::kStaged || parcel.casts);
    if (!known || parcel.bytes > found->second.slot_bytes ||
        (lands && parcel.landing_bytes > found->second.landing_bytes))
        throw Failure(Fault::kTransport, host_.source(),
                      "a message on link '" + host_.link().name + "' exceeds its slot, or lies in none");
    return &found->second;
}

// Into memory of this device, with the casts undone, on a stream of the link's own; `consumer` goes on after that.
void DeviceReceiver::land(Delivery& delivery, const Slots& slots, StreamHandle consumer) {
    const std::uint64_t seq = delivery.arrival->seq();
    const Pointer slot = slots.slot(seq, taken_.size());
    delivery.base = slots.landing->pointer() + (seq - 1) % taken_.size() * slots.landing_bytes;
    delivery.memory = slots.landing;
    delivery.landed = true;
    flags_->wait(landing_->handle(), board_->lane(seq).data, seq);
    for (const Part& part : delivery.parcel.parts)
        if (part.bytes) kernels_.take(part, delivery.base + part.landing, slot, landing_->handle());
    landed_->record(landing_->handle());
    demand(Driver::get().stream_wait_event(consumer, landed_->handle(), 0), "waiting for an event");
}

void DeviceReceiver::drain(StreamHandle consumer) {
    while (announced()) {
        const std::uint64_t tag = host_.next().tag;
        wait(tag, -1);
        take(tag, consumer);
    }
}

bool DeviceReceiver::take_into(std::uint64_t tag, StreamHandle consumer, const DeviceTensor& into) {
    const Header& header = host_.next();
    std::uint64_t elements = 1;
    for (std::size_t dim = 0; dim < std::min<std::size_t>(header.ndim, kMaxDims); ++dim) elements *= header.shape[dim];
    if ((header.flags & (kDevice | kBundle)) != kDevice || header.dtype != into.dtype || elements != into.elements ||
        !Kernels::adds(into.dtype))
        return false;
    const std::shared_ptr<Arrival> arrival = host_.take(tag);
    const Parcel parcel = lay_out(announced(*arrival), codec_);
    const std::lock_guard lock(mutex_);
    const Current current(*context_);
    const std::uint64_t seq = arrival->seq();
    const Slots* slots = slots_of(*arrival, parcel);
    Mark& mark = expect(*arrival, consumer);
    flags_->wait(consumer, board_->lane(seq).data, seq);
    if (slots) kernels_.add(parcel.parts[0], into.data, slots->slot(seq, taken_.size()), consumer);
    mark.end();
    return true;
}

void DeviceReceiver::give_back(std::uint64_t seq, StreamHandle consumer) noexcept {
    if (job_->session()->inherited.load()) return;
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    try {
        const Current current(*context_);
        Mark& mark = consumers_.mark(consumer);
        mark.begin();
        flags_->write(consumer, board_->lane(seq).credit, seq, nullptr);
        mark.end();
    } catch (const Failure& failure) {
        job_->abort("rank " + std::to_string(job_->rank()) + " failed, giving a slot of link '" + host_.link().name +
                    "' back: " + failure.what());
    }
}

// Whether streams are through with the link.
bool DeviceReceiver::drained() const {
    return idle_or_lost(*context_, consumers_) && idle_or_lost(*context_, *landing_) &&
           idle_or_lost(*context_, *rescue_);
}

bool DeviceReceiver::owns(std::uintptr_t pointer) const {
    const std::lock_guard lock(mutex_);
    const auto within = [pointer](const std::shared_ptr<DeviceMemory>& memory) {
        return memory && pointer >= memory->pointer() && pointer < memory->pointer() + memory->size();
    };
    for (const auto& [generation, slots] : slots_)
        if (within(slots.memory) || within(slots.landing)) return true;
    return host_.owns(reinterpret_cast<const void*>(pointer));
}

void DeviceReceiver::tend() {
    grant();
    if (job_->page().aborted()) release();
}

// The job has failed: whatever was not written becomes NaN, and streams that wait for it go on. A stream may still
// write a flag anew, so this is done again and again until all are through.
void DeviceReceiver::release() {
    const std::lock_guard lock(mutex_);
    if (closed_ || drained()) return;
    try {
        for (std::uint64_t place = 0; place < taken_.size(); ++place)
            if (taken_[place] > board_->lane(place + 1).data.load()) poison(place);
        // Not longer: where all streams share one queue, the poison itself waits behind the parked one.
        for (const std::int64_t start = now_ns(); !rescue_->idle() && now_ns() - start < kPoisoning;)
            std::this_thread::sleep_for(kLook);
    } catch (const Failure&) {  // the device has failed: what waits on it must still be let go
    }
    for (std::uint64_t place = 0; place < taken_.size(); ++place) board_->lane(place + 1).data.store(kReleased);
}

void DeviceReceiver::poison(std::uint64_t place) {
    const auto found = slots_.find(board_->lane(place + 1).generation);
    if (found == slots_.end()) return;
    const Slots& slots = found->second;
    if (slots.stage) {
        std::memset(slots.stage->host()->data() + place * slots.slot_bytes, kPoison, slots.slot_bytes);
        return;
    }
    const Current current(*context_);
    const Pointer slot = slots.slot(place + 1, taken_.size());
    demand(Driver::get().fill(slot, kPoison, slots.slot_bytes, rescue_->handle()), "poisoning a slot");
}

void DeviceReceiver::close() {
    if (job_->session()->inherited.load()) return;
    board_->closing().store(1);
    steward_->ring(host_.source());
    std::int64_t drained_at = 0;
    for (bool through = false; !through; std::this_thread::sleep_for(kLook)) {
        const std::lock_guard lock(mutex_);
        if (!drained()) continue;  // looked at until the end: a delivery may go while the sender is waited for
        if (drained_at == 0) drained_at = now_ns();
        const bool let_go = board_->ended().load() || job_->has_died(host_.source());
        if (!let_go && now_ns() - drained_at < kLetGo) continue;
        through = closed_ = true;
        for (auto& [generation, slots] : slots_)
            if (!let_go && slots.memory) slots.memory->abandon();
        slots_.clear();
    }
}

}  // namespace pipekern::cuda
