#include "cuda/flags.h"

#include "transport/futex.h"

namespace pipekern::cuda {
namespace {

struct Write {
    std::shared_ptr<const Board> board;  // which holds the flag
    std::atomic<std::uint64_t>& flag;
    std::uint64_t value;
    std::atomic<std::uint32_t>* wake;
};

void write_from_host(void* data) {
    const std::unique_ptr<Write> write(static_cast<Write*>(data));
    write->flag.store(write->value, std::memory_order_seq_cst);
    if (!write->wake || write->wake->load(std::memory_order_seq_cst) == 0) return;
    write->wake->store(0, std::memory_order_relaxed);
    futex_wake(*write->wake);
}

}  // namespace

void Flags::write(StreamHandle stream, std::atomic<std::uint64_t>& flag, std::uint64_t value,
                  std::atomic<std::uint32_t>* wake) const {
    const Driver& driver = Driver::get();
    if (by_streams_) {
        demand(driver.stream_write_value(stream, board_->address(flag), value, kWriteWithFence), "a stream's write");
        return;
    }
    auto write = std::make_unique<Write>(Write{board_, flag, value, wake});
    demand(driver.launch_host(stream, write_from_host, write.get()), "a callback in a stream");
    static_cast<void>(write.release());
}

void Flags::wait(StreamHandle stream, const std::atomic<std::uint64_t>& flag, std::uint64_t value) const {
    if (!by_streams_) return;
    demand(Driver::get().stream_wait_value(stream, board_->address(flag), value, kWaitGreaterOrEqual),
           "a stream's wait");
}

}  // namespace pipekern::cuda
