// Links between a device and a rank on the CPU: order, credit, growth, and failing calls of the driver.
#include <cstring>
#include <deque>
#include <random>

#include "cuda/staged_receiver.h"
#include "cuda/staged_sender.h"
#include "device_link.h"

using namespace device_link;

namespace {

using Values = std::vector<std::uint32_t>;

Label label_of(std::uint64_t tag, std::size_t count) {
    Label label{tag, 0, kU32, 1, 0};
    label.shape[0] = static_cast<std::uint32_t>(count);
    return label;
}

Values read(const Arrival& arrival) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(arrival.payload());
    return {words, words + arrival.header().bytes / 4};
}

// From a device to the CPU.
struct Down {
    std::shared_ptr<Job> job = ranks::alone();
    Mine source;
    StagedSender sender;
    Receiver receiver;

    explicit Down(std::uint64_t slots)
        : sender(job, {0, "0>0", slots}, 0, source.context), receiver(job, {0, "0>0", slots}, 0) {}
    ~Down() { sender.close(); }

    bool send(std::uint64_t tag, const Values& values) {
        const Pointer tensor = source.memory->pointer() + tag % 64 * 16384;
        const Mine::Through through{source};
        source.copy(tensor, values.data(), 4 * values.size());
        return sender.send(label_of(tag, values.size()), {{nullptr, 4 * values.size()}}, {tensor}, source.handle(),
                           true);
    }
    std::shared_ptr<Arrival> take(std::uint64_t tag) {
        CHECK(receiver.wait(tag, -1));
        return receiver.take(tag);
    }
};

// From the CPU to a device.
struct Up {
    std::shared_ptr<Job> job = ranks::alone();
    Mine target;
    Sender sender;
    std::shared_ptr<StagedReceiver> receiver;

    explicit Up(std::uint64_t slots)
        : sender(job, {0, "0>0", slots}, 0),
          receiver(std::make_shared<StagedReceiver>(job, LinkName{0, "0>0", slots}, 0, target.context)) {}
    ~Up() { receiver->close(); }

    bool send(std::uint64_t tag, const Values& values) {
        const Piece piece{values.data(), 4 * values.size()};
        return sender.send(label_of(tag, values.size()), &piece, 1);
    }
    // Queues the copy to the device, and lets the slot go at once.
    Pointer take(std::uint64_t tag, std::size_t count) {
        CHECK(receiver->wait(tag, -1));
        const auto arrival = receiver->take(tag, target.handle());
        const Pointer place = target.memory->pointer() + tag % 64 * 16384;
        target.copy(place, arrival->payload(), 4 * count);
        return place;
    }
};

void golden() {
    Down down(1);
    CHECK(down.send(1, {10, 11, 12}));
    CHECK(!down.send(2, {20}));
    auto one = down.take(1);
    CHECK((read(*one) == Values{10, 11, 12}));
    CHECK(!down.send(2, {20}));  // read, but still in use
    one = {};
    CHECK(down.send(2, {20}));
    CHECK((read(*down.take(2)) == Values{20}));

    Up up(1);
    CHECK(up.send(1, {30, 31}));
    const Pointer place = up.take(1, 2);
    up.target.synchronize();
    CHECK_EQUAL(reinterpret_cast<std::uint32_t*>(place)[1], 31u);
}

// What has no tensor of the device keeps its place behind what has; pieces of both are in one message.
void pieces() {
    Down down(3);
    Gate gate;
    const std::uint32_t host = 7;
    gate.hold(down.source);
    CHECK(
        down.sender.send(label_of(1, 1), {{nullptr, 4}}, {down.source.memory->pointer()}, down.source.handle(), true));
    CHECK(down.sender.send(label_of(2, 1), {{&host, 4}}, {}, down.source.handle(), true));
    CHECK(!down.receiver.ready());
    Label bundle{3, 0, 0, 0, kBundle};
    bundle.descriptor = 2;
    CHECK(down.sender.send(bundle, {{"ab", 2}, {nullptr, 4}, {&host, 4}}, {down.source.memory->pointer() + 4},
                           down.source.handle(), false));
    CHECK_EQUAL(down.sender.reap(), 0u);
    gate.open = true;
    CHECK_EQUAL(read(*down.take(1))[0], 0u);
    CHECK_EQUAL(read(*down.take(2))[0], 7u);
    const auto last = down.take(3);
    CHECK(std::memcmp(last->payload(), "ab", 2) == 0 && read(*last)[16] == 0 && read(*last)[32] == 7);
    while (down.sender.reap() < 2) sched_yield();
}

// A slot is free again when the stream that took its message has read it, and not when its last view dies.
void a_stream_still_reads() {
    Up up(1);
    Gate gate;
    CHECK(up.send(1, {1, 2, 3}));
    gate.hold(up.target);
    const Pointer place = up.take(1, 3);
    CHECK(up.receiver->held().empty());
    for (int i = 0; i < 100; ++i) CHECK(!up.send(2, {4, 5, 6}));
    gate.open = true;
    while (!up.send(2, {4, 5, 6})) sched_yield();
    up.target.synchronize();
    CHECK_EQUAL(reinterpret_cast<std::uint32_t*>(place)[2], 3u);
}

// Two threads, messages of random size: each arrives whole and in order.
void stress() {
    const Knobs restore;
    for (const int one_queue : {0, 1})
        for (const std::uint64_t slots : {1, 3}) {
            fake::knobs().jitter = 100;
            fake::knobs().one_queue = one_queue;
            const auto seed = std::random_device{}();
            Down down(slots);
            Up up(slots);
            ranks::each(2, [&](int side) {
                std::mt19937 random(seed);  // the same numbers on both sides
                for (std::uint64_t tag = 1; tag <= 40; ++tag) {
                    Values values(1 + random() % (tag % 10 == 0 ? 4000 : 60));
                    for (auto& value : values) value = random();
                    if (side == 0) {
                        while (!down.send(tag, values)) sched_yield();
                        const Pointer place = up.take(tag, values.size());
                        up.target.synchronize();
                        CHECK(std::memcmp(reinterpret_cast<void*>(place), values.data(), 4 * values.size()) == 0);
                    } else {
                        CHECK(read(*down.take(tag)) == values);
                        while (!up.send(tag, values)) sched_yield();
                    }
                }
            });
        }
}

// Every call of an exchange fails once: it raises and neither hangs nor leaks.
void each_call_fails_once() {
    const Knobs restore;
    int raised = 0;
    for (int call = 0, last = 0; call <= last; ++call) {  // first none: how many there are
        fake::calls() = 0;
        fake::knobs().fail = call;
        try {
            Down down(2);
            Up up(2);
            for (std::uint64_t tag = 1; tag <= 3; ++tag) {
                CHECK(down.send(tag, {1, 2, 3}));
                CHECK_EQUAL(read(*down.take(tag)).size(), 3u);
                CHECK(up.send(tag, {1, 2, 3}));
                up.take(tag, 3);
                up.target.synchronize();
                while (!up.sender.free(tag + 1)) sched_yield();
            }
        } catch (const Failure& failure) {
            CHECK(failure.kind() == Fault::kTransport || failure.kind() == Fault::kAborted);
            if (call == 0) check::fail(__FILE__, __LINE__, failure.what());
            ++raised;
        }
        last = std::max(last, fake::calls().load());
        fake::knobs().fail = 0;
    }
    CHECK(raised >= 30);
}

}  // namespace

int main() {
    golden();
    pieces();
    a_stream_still_reads();
    stress();
    each_call_fails_once();
    CHECK_EQUAL(fake::leaks(), std::string());
}
