// A link between devices whose two ends are in this process, over the stand-in driver.
#pragma once

#include <memory>
#include <vector>

#include "check.h"
#include "cuda/receiver.h"
#include "cuda/sender.h"
#include "fake_driver.h"
#include "transport/ranks.h"

namespace device_link {

using namespace pipekern;
using namespace pipekern::cuda;

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
    // Also where a query is made to fail.
    void synchronize() const {
        while (Driver::get().stream_query(stream->handle()) != kSuccess) sched_yield();
    }
    StreamHandle handle() const { return stream->handle(); }

    // Synchronizes at its end, however it comes.
    struct Through {
        const Mine& mine;
        ~Through() { mine.synchronize(); }
    };
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
        const Mine::Through through{source};                                 // `values` may go
        source.copy(tensor, values.data(), 4 * values.size());
        Label label{tag, 0, kU32, 1, 0};
        label.shape[0] = static_cast<std::uint32_t>(values.size());
        return sender.send(label, {}, {{tensor, values.size(), kU32}}, source.handle(), true);
    }
    std::vector<std::uint32_t> read(const Delivery& delivery) const {
        std::vector<std::uint32_t> values(delivery.parcel.parts[0].elements);
        target.copy(reinterpret_cast<Pointer>(values.data()),
                    reinterpret_cast<void*>(delivery.base + delivery.offset(0)), 4 * values.size());
        target.synchronize();
        return values;
    }
};

// A stream that goes on only when the test says so.
struct Gate {
    std::atomic<bool> open{false};
    void hold(const Mine& mine) {
        const Current current(*mine.context);
        const auto wait = [](void* data) {
            while (!static_cast<Gate*>(data)->open.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        };
        demand(Driver::get().launch_host(mine.handle(), wait, this), "the test");
    }
};

// Puts the stand-in's knobs back.
struct Knobs {
    ~Knobs() {
        fake::Knobs& all = fake::knobs();
        for (auto* knob : {&all.jitter, &all.one_queue, &all.no_ipc, &all.no_peer, &all.no_stream_ops, &all.fail})
            knob->store(0);
        all.devices = 2;
    }
};

}  // namespace device_link
