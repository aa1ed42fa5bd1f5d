// One link from a rank to itself: order, credit, growth, refusals, damage. The two ends share one mapping, so that the
// thread sanitizer sees whether the flags alone make the payload safe to read.
#include <cstring>
#include <deque>
#include <numeric>
#include <random>

#include "check.h"
#include "ranks.h"
#include "transport/digest.h"
#include "transport/dlpack.h"
#include "transport/receiver.h"
#include "transport/sender.h"

using namespace pipekern;

namespace {

struct Link {
    explicit Link(std::uint64_t slots, std::int64_t timeout_ns = 60 * kSecond)
        : job(ranks::alone(timeout_ns)), sender(job, {0, "0>0", slots}, 0), receiver(job, {0, "0>0", slots}, 0) {}

    std::shared_ptr<Job> job;
    Sender sender;
    Receiver receiver;
};

bool send(Sender& sender, std::uint64_t tag, const std::vector<std::uint32_t>& values, std::uint64_t sum = 0) {
    Label label{tag, sum, 6, 1, 0};  // 6: uint32
    label.shape[0] = static_cast<std::uint32_t>(values.size());
    const Piece piece{values.data(), 4 * values.size()};
    return sender.send(label, &piece, 1);
}

std::uint32_t first(const Arrival& arrival) {
    std::uint32_t value;
    std::memcpy(&value, arrival.payload(), 4);
    return value;
}

void golden() {
    Link link(2);
    CHECK(!link.receiver.ready());
    CHECK(!link.receiver.wait(1, 0));
    CHECK(send(link.sender, 1, {10, 11, 12}));
    CHECK(send(link.sender, 2, {20}));
    CHECK(!send(link.sender, 3, {30}));  // both slots are full
    CHECK(link.receiver.ready());
    auto one = link.receiver.take(1);
    CHECK_EQUAL(first(*one), 10u);
    CHECK_EQUAL(one->header().bytes, 12u);
    CHECK(!send(link.sender, 3, {30}));  // read, but still in use
    one.reset();
    CHECK(send(link.sender, 3, {30}));
    CHECK_EQUAL(first(*link.receiver.take(2)), 20u);
    CHECK_EQUAL(first(*link.receiver.take(3)), 30u);
    CHECK(!link.receiver.ready());
}

// Credits come back in any order; the sender waits for the slot that is next.
void credit_out_of_order() {
    Link link(3);
    for (std::uint32_t n = 1; n <= 3; ++n) CHECK(send(link.sender, n, {n}));
    auto one = link.receiver.take(1), two = link.receiver.take(2), three = link.receiver.take(3);
    CHECK_EQUAL(link.receiver.held().size(), 3u);
    CHECK_EQUAL(first(*link.receiver.held()[0]), 1u);
    two.reset();
    three.reset();
    CHECK_EQUAL(link.receiver.held().size(), 1u);
    CHECK(!send(link.sender, 4, {4}));
    one.reset();
    for (std::uint32_t n = 4; n <= 6; ++n) CHECK(send(link.sender, n, {n}));
    CHECK(!send(link.sender, 7, {7}));
    for (std::uint32_t n = 4; n <= 6; ++n) CHECK_EQUAL(first(*link.receiver.take(n)), n);
    CHECK(link.receiver.held().empty());
}

// A message that does not fit brings a larger memory; views of the old one stay whole until they die.
void growth() {
    Link link(4);
    CHECK(send(link.sender, 1, {1}));
    auto old = link.receiver.take(1);
    CHECK(link.receiver.owns(old->payload()) && !link.receiver.owns(&link));
    std::vector<std::uint32_t> large(300'000);
    std::iota(large.begin(), large.end(), 5);
    CHECK(send(link.sender, 2, large));
    CHECK(send(link.sender, 3, {}));
    auto grown = link.receiver.take(2);
    CHECK(std::memcmp(grown->payload(), large.data(), 4 * large.size()) == 0);
    CHECK_EQUAL(first(*old), 1u);
    const void* place = old->payload();
    CHECK(link.receiver.owns(place));
    old.reset();
    CHECK(!link.receiver.owns(place));  // unmapped with its last view
    CHECK_EQUAL(link.receiver.take(3)->header().bytes, 0u);
}

void mismatch_and_damage() {
    Link link(2);
    CHECK(send(link.sender, 8, {1}));
    CHECK_RAISES(Fault::kMismatch, 0, "has tag 8, the program expects 9", link.receiver.take(9));
    CHECK_EQUAL(first(*link.receiver.take(8)), 1u);  // the refused message is not lost
    CHECK_RAISES(Fault::kTransport, -1, "no message", link.receiver.take(9));
    for (const Label& label : {Label{1, 0, 200, 1, 0, {1}}, Label{1, 0, 6, 5, 0, {1}}, Label{1, 0, 6, 1, 0, {2}}}) {
        Link fresh(1);
        const std::uint32_t value = 1;
        const Piece piece{&value, 4};
        CHECK(fresh.sender.send(label, &piece, 1));
        CHECK_RAISES(Fault::kTransport, 0, "damaged header", fresh.receiver.take(1));
    }
}

// Bundles: pieces at multiples of 64 bytes; the credit waits for the last view.
void bundle_views() {
    Link link(1);
    const char descriptor[] = "{}";
    const std::vector<double> left{1.5, 2.5};
    const std::vector<std::uint8_t> right{7, 8, 9};
    const Piece pieces[] = {{descriptor, 2}, {left.data(), 16}, {right.data(), 3}};
    Label label{4, 0, 0, 0, kBundle};
    label.descriptor = 2;
    CHECK(link.sender.send(label, pieces, 3));
    auto arrival = link.receiver.take(4);
    DLManagedTensorVersioned* one = view_of(arrival, 64, 11, {2});
    DLManagedTensorVersioned* two = view_of(arrival, 128, 0, {3, 1});
    CHECK_RAISES(Fault::kTransport, -1, "beyond", view_of(arrival, 128, 0, {4}));
    CHECK_RAISES(Fault::kTransport, -1, "beyond", view_of(arrival, 64, 11, {1LL << 40, 1LL << 40}));
    CHECK_RAISES(Fault::kTransport, -1, "beyond", view_of(arrival, 1 << 20, 0, {0}));
    arrival.reset();
    CHECK(std::memcmp(one->dl_tensor.data, left.data(), 16) == 0);
    CHECK(std::memcmp(two->dl_tensor.data, right.data(), 3) == 0);
    CHECK(one->dl_tensor.dtype.code == 2 && one->dl_tensor.dtype.bits == 64 && two->dl_tensor.ndim == 2);
    one->deleter(one);
    CHECK(!link.sender.free(5));
    two->deleter(two);
    CHECK(link.sender.free(5));
}

// Two threads, messages of random size kept for random times: each arrives whole, in order, and stays so while held.
void stress(std::uint64_t slots, std::uint32_t messages, bool sleepy) {
    Link link(slots);
    const auto seed = std::random_device{}();
    ranks::each(2, [&](int side) {
        std::mt19937 random(seed);  // the same numbers on both sides
        if (side == 0) {
            for (std::uint32_t n = 1; n <= messages; ++n) {
                std::vector<std::uint32_t> values(random() % (n % 50 == 0 ? 5000 : 40));
                for (auto& value : values) value = random();
                if (sleepy && n % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
                while (!send(link.sender, n, values, digest(values.data(), 4 * values.size(), n))) sched_yield();
            }
            return;
        }
        std::deque<std::shared_ptr<Arrival>> kept;
        const auto verify = [](const Arrival& arrival) {
            const Header& header = arrival.header();
            CHECK_EQUAL(digest(arrival.payload(), header.bytes, header.tag), header.digest);
        };
        std::mt19937 choice(seed + 1);
        for (std::uint32_t n = 1; n <= messages; ++n) {
            // The slot of message n must be free, whatever else is kept.
            while (!kept.empty() && (kept.front()->header().tag + slots <= n || choice() % 2)) {
                const auto at = kept.begin() + static_cast<std::ptrdiff_t>(choice() % 2 ? 0 : choice() % kept.size());
                verify(**at);
                kept.erase(at);
            }
            CHECK(link.receiver.wait(n, -1));
            kept.push_back(link.receiver.take(n));
            verify(*kept.back());
        }
    });
}

// One end is one thread's at a time.
void two_threads_on_one_end() {
    Link link(1);
    std::atomic<int> refused{0}, late{0};
    ranks::each(2, [&](int) {
        try {
            if (!link.receiver.wait(1, 300 * kMillisecond)) ++late;
        } catch (const Failure& failure) {
            CHECK(std::string(failure.what()).find("two threads") != std::string::npos);
            ++refused;
        }
    });
    CHECK_EQUAL(refused + late, 2);
    CHECK(late >= 1);
}

// Nobody will ever send: the only rank waits for itself.
void deadline() {
    Link link(1, kSecond / 2);
    CHECK_RAISES(Fault::kTimeout, -1, "rank 0 waits", link.receiver.wait(5, -1));
    CHECK_RAISES(Fault::kTimeout, -1, "tag 5 on link '0>0' from rank 0", link.job->check());
    CHECK_RAISES(Fault::kTimeout, -1, "nobody can go on", send(link.sender, 1, {1}));
}

// Sends that are refused again and again, and short waits one after the other, are waiting too.
void deadline_of_retries() {
    Link link(1, kSecond / 2);
    CHECK(send(link.sender, 1, {1}));
    const std::int64_t start = now_ns();
    CHECK_RAISES(Fault::kTimeout, -1, "a free slot for the message with tag 2", [&] {
        while (now_ns() - start < 20 * kSecond) CHECK(!send(link.sender, 2, {2}));
    }());
    Link other(1, kSecond / 2);
    CHECK_RAISES(Fault::kTimeout, -1, "tag 7", [&] {
        while (now_ns() - start < 20 * kSecond) CHECK(!other.receiver.wait(7, kMillisecond));
    }());
}

}  // namespace

int main() {
    golden();
    credit_out_of_order();
    growth();
    mismatch_and_damage();
    bundle_views();
    stress(1, 2000, false);
    stress(3, 4000, false);
    stress(8, 1000, true);
    two_threads_on_one_end();
    deadline();
    deadline_of_retries();
}
