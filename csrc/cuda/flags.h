// How streams write a link's flags and wait for them.
#pragma once

#include <functional>
#include <memory>

#include "cuda/board.h"

namespace pipekern::cuda {

// Without stream memory operations the host does both: it writes from a callback in the stream, and looks at a flag
// before it queues what needs it.
class Flags {
  public:
    Flags(std::shared_ptr<const Board> board, bool by_streams) : board_(std::move(board)), by_streams_(by_streams) {}

    bool by_streams() const { return by_streams_; }

    // `flag` becomes `value` after all earlier work of the stream, seen by every device and process; then `wake`, a
    // word on which the reading host may sleep (nullptr: none), is cleared and woken.
    void write(StreamHandle stream, std::atomic<std::uint64_t>& flag, std::uint64_t value,
               std::atomic<std::uint32_t>* wake) const;

    // Later work of the stream begins when `flag` is at least `value`.
    void wait(StreamHandle stream, const std::atomic<std::uint64_t>& flag, std::uint64_t value) const;

  private:
    std::shared_ptr<const Board> board_;
    bool by_streams_;
};

}  // namespace pipekern::cuda
