// One link between devices, both ends in this process, over the stand-in driver.
#include <cstring>
#include <deque>
#include <numeric>
#include <random>

#include "check.h"
#include "cuda/receiver.h"
#include "cuda/sender.h"
#include "fake_driver.h"
#include "transport/ranks.h"

using namespace pipekern;
using namespace pipekern::cuda;

namespace {

constexpr std::uint8_t kU32 = 6;

// A stream and memory of the test's own, in the place of torch's.
struct Mine {
    std::shared_ptr<const Context> context;
    std::unique_ptr<Stream> stream;
    std::unique_ptr<DeviceMemory> memory;

    explicit Mine(int device = 0, std::size_t bytes = 1 << 20) : context(std::make_shared<const Context>(device)) {
        const Current current(*context);
        stream = std::make_unique<Stream>();
        memory = std::make_unique<DeviceMemory>(context, bytes, std::uint8_t{0});
    }
    ~Mine() { synchronize(); }
    void synchronize() const { demand(Driver::get().stream_synchronize(stream->handle()), "the test"); }
    StreamHandle handle() const { return stream->handle(); }
    void copy(Pointer target, const void* source, std::size_t bytes) const {
        const Current current(*context);
        demand(Driver::get().copy(target, reinterpret_cast<Pointer>(source), bytes, handle()), "the test");
    }
};

struct Link {
    std::shared_ptr<Job> job = ranks::alone();
    std::shared_ptr<Steward> steward = std::make_shared<Steward>(job);
    Mine source, target;
    DeviceSender sender;
    std::shared_ptr<DeviceReceiver> receiver;

    explicit Link(std::uint64_t slots, Codec codec = Codec::kNone, bool on_host = false, int other = 0)
        : target(other),
          sender(job, steward, {0, "0>0", slots}, 0, codec, source.context, on_host),
          receiver(std::make_shared<DeviceReceiver>(job, steward, LinkName{0, "0>0", slots}, 0, codec, target.context,
                                                    on_host)) {}
    ~Link() {
        sender.close();
        receiver->close();
    }

    bool send(std::uint64_t tag, const std::vector<std::uint32_t>& values) {
        const Pointer tensor = source.memory->pointer() + tag % 64 * 16384;  // a put may still be reading the last
        source.copy(tensor, values.data(), 4 * values.size());
        Label label{tag, 0, kU32, 1, 0};
        label.shape[0] = static_cast<std::uint32_t>(values.size());
        const bool sent = sender.send(label, {}, {{tensor, values.size(), kU32}}, source.handle(), true);
        source.synchronize();  // `values` may go
        return sent;
    }
    std::vector<std::uint32_t> read(const Delivery& delivery) const {
        std::vector<std::uint32_t> values(delivery.parcel.parts[0].elements);
        target.copy(reinterpret_cast<Pointer>(values.data()),
                    reinterpret_cast<void*>(delivery.base + delivery.offset(0)), 4 * values.size());
        target.synchronize();
        return values;
    }
};

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

}  // namespace

int main() {
    golden();
    CHECK_EQUAL(fake::leaks(), std::string());
}
