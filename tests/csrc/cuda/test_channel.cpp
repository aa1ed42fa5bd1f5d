// One link between devices: order, credit, growth, casts, every way and every kind of wait.
#include <cmath>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>

#include "device_link.h"

using namespace device_link;

namespace {

void golden() {
    Link link(2);
    CHECK(!link.receiver->ready());
    CHECK(link.send(1, {10, 11, 12}));
    CHECK(link.send(2, {20}));
    CHECK(!link.send(3, {30}));
    CHECK(link.receiver->wait(1, -1));
    auto one = link.receiver->take(1, link.target.handle());
    CHECK((link.read(one) == std::vector<std::uint32_t>{10, 11, 12}));
    CHECK(link.receiver->owns(one.base) && !link.receiver->owns(link.target.memory->pointer()));
    CHECK(!link.send(3, {30}));  // read, but still in use
    one = {};
    CHECK(link.send(3, {30}));
    CHECK_EQUAL(link.read(link.receiver->take(2, link.target.handle()))[0], 20u);
    CHECK_EQUAL(link.read(link.receiver->take(3, link.target.handle()))[0], 30u);
    CHECK(!link.receiver->ready());
    CHECK_EQUAL(link.sender.way(), std::string("local"));
}

// Messages that carry no tensor, or an empty one, keep their place among the others.
void empty_messages() {
    Link link(2);
    for (std::uint64_t n = 1; n <= 9; n += 3) {
        CHECK(link.send(n, {static_cast<std::uint32_t>(n)}));
        CHECK_EQUAL(link.read(link.receiver->take(n, link.target.handle()))[0], n);
        CHECK(link.send(n + 1, {}));
        CHECK_EQUAL(link.receiver->take(n + 1, link.target.handle()).parcel.bytes, 0u);
        const std::uint32_t value = 7;
        Label label{n + 2, 0, kU32, 1, 0, {1}};
        CHECK(link.sender.send(label, {{&value, 4}}, {}, link.source.handle(), true));
        const auto delivery = link.receiver->take(n + 2, link.target.handle());
        CHECK(delivery.parcel.parts.empty() && std::memcmp(delivery.arrival->payload(), &value, 4) == 0);
    }
}

// Larger messages bring larger slots; what lies in the old ones stays whole.
void growth() {
    Link link(4);
    CHECK(link.send(1, {1}));
    const auto old = link.receiver->take(1, link.target.handle());
    std::vector<std::uint32_t> large(4000);
    std::iota(large.begin(), large.end(), 5);
    CHECK(link.send(2, large));
    CHECK(link.send(3, {3}));
    const auto grown = link.receiver->take(2, link.target.handle());
    CHECK(link.read(grown) == large);
    CHECK_EQUAL(link.read(old)[0], 1u);
    CHECK(link.receiver->owns(old.base) && link.receiver->owns(grown.base));
    CHECK_EQUAL(link.read(link.receiver->take(3, link.target.handle()))[0], 3u);
}

// Two threads, messages of random size kept for random times: each arrives whole, in order, and stays so while held.
void stress(Link& link, std::uint64_t slots, std::uint32_t messages) {
    const auto seed = std::random_device{}();
    ranks::each(2, [&](int side) {
        std::mt19937 random(seed);  // the same numbers on both sides
        const auto next = [&](std::uint32_t n) {
            std::vector<std::uint32_t> values(1 + random() % (n % 10 == 0 ? 4000 : 60));
            for (auto& value : values) value = random();
            return values;
        };
        if (side == 0) {
            for (std::uint32_t n = 1; n <= messages; ++n) {
                const auto values = next(n);
                while (!link.send(n, values)) sched_yield();
            }
            return;
        }
        std::deque<std::pair<Delivery, std::vector<std::uint32_t>>> kept;
        for (std::uint32_t n = 1; n <= messages; ++n) {
            auto values = next(n);
            while (kept.size() == slots || (!kept.empty() && std::random_device{}() % 2)) {
                CHECK(link.read(kept.front().first) == kept.front().second);
                kept.pop_front();
            }
            CHECK(link.receiver->wait(n, -1));
            kept.emplace_back(link.receiver->take(n, link.target.handle()), std::move(values));
        }
    });
}

void every_way(bool on_host, int other, Codec codec, const std::string& way) {
    for (const std::uint64_t slots : {1, 3}) {
        Link link(slots, codec, on_host, other);
        stress(link, slots, 40);
        CHECK_EQUAL(link.sender.way().substr(0, way.size()), way);
    }
}

void every_way() {
    const Knobs restore;
    fake::Knobs& knobs = fake::knobs();
    for (const int jitter : {0, 100})
        for (const int one_queue : {0, 1}) {
            knobs.jitter = jitter;
            knobs.one_queue = one_queue;
            every_way(false, 0, Codec::kNone, "local");
            every_way(false, 1, Codec::kFp8, "local");
            every_way(true, 1, Codec::kNone, "local");
            knobs.no_peer = 1;
            every_way(false, 1, Codec::kNone, "staged: no peer access from device 0 to device 1");
            knobs.no_stream_ops = 1;
            every_way(false, 1, Codec::kNone, "staged");
            knobs.no_peer = knobs.no_stream_ops = 0;
        }
}

struct Cased {
    std::uint8_t dtype;
    Codec codec;
    double error;  // relative to the largest of a group of values
};

// Values survive a codec up to its rounding; those that are not finite stay so.
void codecs(bool staged) {
    const Knobs restore;
    fake::knobs().no_peer = staged;
    constexpr std::uint8_t kF32 = 10;
    std::mt19937 random(std::random_device{}());
    std::normal_distribution<float> normal;
    for (const Cased& cased :
         {Cased{kF32, Codec::kBf16, 1.0 / 256}, Cased{kF32, Codec::kFp8, 1.0 / 16}, Cased{kF32, Codec::kNone, 0.0}}) {
        for (const std::size_t count : {1, 127, 128, 1000}) {
            Link link(2, cased.codec, false, 1);
            std::vector<float> values(count);
            for (float& value : values) value = normal(random);
            if (count == 1000) values[300] = INFINITY, values[600] = NAN;
            link.source.copy(link.source.memory->pointer(), values.data(), 4 * count);
            std::vector<float> sum(count, 1.0f);
            link.target.copy(link.target.memory->pointer(), sum.data(), 4 * count);
            for (const std::uint64_t tag : {1, 2}) {
                Label label{tag, 0, kF32, 1, 0, {static_cast<std::uint32_t>(count)}};
                CHECK(link.sender.send(label, {}, {{link.source.memory->pointer(), count, kF32}}, link.source.handle(),
                                       false));
            }
            std::vector<float> got(count);
            {
                const auto delivery = link.receiver->take(1, link.target.handle());
                const Pointer place = delivery.base + delivery.offset(0);
                link.target.copy(reinterpret_cast<Pointer>(got.data()), reinterpret_cast<void*>(place), 4 * count);
            }
            CHECK(!link.receiver->take_into(2, link.target.handle(), {link.target.memory->pointer(), count + 1, kF32}));
            CHECK(link.receiver->take_into(2, link.target.handle(), {link.target.memory->pointer(), count, kF32}));
            link.target.copy(reinterpret_cast<Pointer>(sum.data()),
                             reinterpret_cast<void*>(link.target.memory->pointer()), 4 * count);
            link.target.synchronize();
            for (std::size_t i = 0; i < count; ++i) {
                CHECK(sum[i] == got[i] + 1.0f || std::isnan(sum[i]));
                if (!std::isfinite(values[i]) && cased.codec != Codec::kNone) CHECK(!std::isfinite(got[i]));
                if (std::isfinite(got[i])) CHECK(std::fabs(got[i] - values[i]) <= 5 * cased.error);
            }
        }
    }
}

}  // namespace

int main() {
    fake::knobs().devices = 2;
    golden();
    empty_messages();
    growth();
    every_way();
    codecs(false);
    codecs(true);
    CHECK_EQUAL(fake::leaks(), std::string());
}
