#include "cuda/sender.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "transport/clock.h"
#include "transport/wait.h"

namespace pipekern::cuda {
namespace {

std::shared_ptr<const Board> open_board(Job& job, Steward& steward, const LinkName& link, int target,
                                        std::shared_ptr<const Context> context) {
    auto memory = Memory::create(Board::size(link.slots));
    auto board = std::make_shared<const Board>(std::move(context), memory, link.slots);
    if (target == job.rank())
        steward.lend(link.number, board);
    else
        job.pass(target, {Frame::kBoard, link.number, 0, kVersion, memory->size()}, memory);
    memory->drop_fd();
    return board;
}

// Slots of one size are the usual case: they take what they need. Those that must grow at least double, so that all
// outgrown ones together are smaller than the last.
std::uint64_t grown(std::uint64_t bytes, std::uint64_t before) {
    return bytes <= before ? before : align_up(std::max(bytes, 2 * before), 4096);
}

constexpr auto kLook = std::chrono::microseconds(100);  // between two looks at a stream that a close waits for

}  // namespace

DeviceSender::DeviceSender(std::shared_ptr<Job> job, std::shared_ptr<Steward> steward, LinkName link, int target,
                           Codec codec, std::shared_ptr<const Context> context, bool wait_on_host)
    : job_(std::move(job)),
      steward_(std::move(steward)),
      context_(std::move(context)),
      codec_(codec),
      host_(job_, link, target),
      board_(open_board(*job_, *steward_, link, target, context_)),
      flags_(board_, !wait_on_host && context_->has_stream_memory_ops()),
      kernels_(context_),
      used_(link.slots) {
    const Current current(*context_);
    copies_ = std::make_unique<Copies>();
    steward_->add(*this);
}

DeviceSender::~DeviceSender() { steward_->remove(*this); }

bool DeviceSender::free(std::uint64_t tag) {
    if (!host_.free(tag)) return false;
    const std::uint64_t before = used_[(host_.next() - 1) % used_.size()];
    return flags_.by_streams() || board_->lane(host_.next()).credit.load() >= before || host_.refuse(tag);
}

bool DeviceSender::send(Label label, std::vector<Piece> pieces, const std::vector<DeviceTensor>& tensors,
                        StreamHandle producer, bool given) {
    const std::lock_guard lock(mutex_);
    if (!free(label.tag)) return false;
    const Parcel parcel = lay_out(tensors, codec_);
    if (tensors.empty()) return host_.send(label, pieces.data(), pieces.size());
    label.flags |= kDevice;
    provide(parcel, label.tag);
    return host_.send(label, pieces.data(), pieces.size(), [&](std::byte*) {
        enqueue(parcel, tensors, producer, given);
        return true;
    });
}

bool DeviceSender::fits(const Parcel& parcel) const {
    const bool lands = slots_.way == Way::kStaged || parcel.casts;
    return slots_.base && parcel.bytes <= slots_.slot_bytes && (!lands || parcel.landing_bytes <= slots_.landing_bytes);
}

// Slots that hold the parcel, by the straightest way that is open.
void DeviceSender::provide(const Parcel& parcel, std::uint64_t tag) {
    if (ended_) job_->fail_closed({Awaited::kSlot, host_.target(), tag, &host_.link().name});
    if (parcel.bytes == 0 || fits(parcel)) return;
    const Way straight = host_.target() == job_->rank() ? Way::kLocal : Way::kIpc;
    if (slots_.way != Way::kStaged) {
        const std::string refusal = ask(straight, parcel, tag);
        if (refusal.empty()) return;
        detour_ = refusal;
        job_->observer().note("link '" + host_.link().name + "' goes through host memory: " + refusal);
    }
    const std::string refusal = ask(Way::kStaged, parcel, tag);
    if (!refusal.empty()) throw Failure(Fault::kTransport, host_.target(), refusal);
}

// Asks the receiver's steward, and waits for its answer. Returns why it cannot be, if so.
std::string DeviceSender::ask(Way way, const Parcel& parcel, std::uint64_t tag) {
    Slots slots;
    slots.way = way;
    slots.slot_bytes = grown(parcel.bytes, slots_.slot_bytes);
    if (way == Way::kStaged || parcel.casts) slots.landing_bytes = grown(parcel.landing_bytes, slots_.landing_bytes);
    board_->want() = {way, context_->device(), slots.slot_bytes, slots.landing_bytes};
    board_->wanted().store(++generation_, std::memory_order_seq_cst);
    steward_->ring(host_.target());
    const Awaited slot{Awaited::kSlot, host_.target(), tag, &host_.link().name};
    wait_for(*job_, slot, board_->asking(), [&] { return board_->granted().load() == generation_; }, -1);
    job_->page().progress();
    const Board::Grant& grant = board_->grant();
    if (grant.refusal[0]) return grant.refusal;
    try {
        import_slots(slots);
    } catch (const Failure& failure) {
        if (way == Way::kStaged) throw;
        return failure.what();
    }
    if (slots_.owner) outgrown_.push_back(std::move(slots_.owner));
    slots_ = std::move(slots);
    return "";
}

void DeviceSender::import_slots(Slots& slots) {
    const Board::Grant& grant = board_->grant();
    if (host_.target() == job_->rank()) {
        slots.base = grant.address;
    } else if (slots.way == Way::kIpc) {
        auto memory = std::make_shared<ImportedMemory>(context_, grant.handle);
        slots.base = memory->pointer();
        slots.owner = std::move(memory);
    } else {
        auto shared = job_->exchange().take(host_.target(), Frame::kStage, host_.link().number, generation_);
        if (!shared) throw Failure(Fault::kTransport, host_.target(), "staging memory was announced and did not come");
        auto memory = std::make_shared<RegisteredMemory>(context_, std::move(shared));
        slots.base = memory->pointer();
        slots.owner = std::move(memory);
    }
}

void DeviceSender::enqueue(const Parcel& parcel, const std::vector<DeviceTensor>& tensors, StreamHandle producer,
                           bool given) {
    const Current current(*context_);
    const std::uint64_t seq = host_.next(), place = (seq - 1) % used_.size();
    Board::Lane& lane = board_->lane(seq);

    // 1. After the producer, and once the slot's last message has been used.
    copies_->begin(producer);
    if (used_[place]) flags_.wait(copies_->handle(), lane.credit, used_[place]);

    // 2. One pass over each tensor.
    const Pointer slot = slots_.base + place * slots_.slot_bytes;
    for (std::size_t i = 0; i < tensors.size(); ++i)
        if (parcel.parts[i].bytes) kernels_.put(parcel.parts[i], slot, tensors[i].data, copies_->handle());

    // 3. The message is whole.
    lane.generation = generation_;
    flags_.write(copies_->handle(), lane.data, seq, &host_.ring().sleeping());
    copies_->end(producer, given);
    used_[place] = seq;
}

std::uint64_t DeviceSender::reap() {
    const std::lock_guard lock(mutex_);
    const Current current(*context_);
    return copies_->reap();
}

std::string DeviceSender::way() const {
    const std::lock_guard lock(mutex_);
    static constexpr const char* kNames[] = {"", "local", "ipc", "staged"};
    const std::string name = kNames[static_cast<std::uint32_t>(slots_.way)];
    return detour_.empty() ? name : name + ": " + detour_;
}

void DeviceSender::tend() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || ended_) return;
    const bool idle = idle_or_lost(*context_, *copies_);
    // The streams that were to write these flags may be gone. Where they are not, they may write them once more.
    if (!idle && job_->page().aborted())
        for (std::uint64_t seq = 1; seq <= board_->slots(); ++seq) board_->lane(seq).credit.store(kReleased);
    if (idle && board_->closing().load()) end();
}

void DeviceSender::end() {
    slots_.owner.reset();
    outgrown_.clear();
    ended_ = true;
    board_->ended().store(1);
    steward_->ring(host_.target());
}

void DeviceSender::close() {
    if (job_->session()->inherited.load()) return;
    for (bool idle = false; !idle; std::this_thread::sleep_for(kLook)) {
        const std::lock_guard lock(mutex_);
        idle = idle_or_lost(*context_, *copies_);
        if (idle && !ended_) end();
    }
}

}  // namespace pipekern::cuda
