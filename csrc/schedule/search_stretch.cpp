#include "schedule/search_stretch.h"

#include <algorithm>
#include <utility>

#include "schedule/search_replay.h"

namespace pipekern::search {

Order stretch(const Problem& shorter, const Order& order, const Problem& longer, int cut, int period) {
    Replay replay(shorter);
    replay.run(order);
    const int added = longer.microbatches - shorter.microbatches;
    const double turn = replay.end(kForward, 0, cut + period) - replay.end(kForward, 0, cut);
    Order out(order.size());
    for (int rank = 0; rank < shorter.ranks; ++rank) {
        std::vector<std::pair<double, int>> times;
        times.reserve(order[rank].size() / shorter.microbatches * longer.microbatches);
        for (int code = 0; code < kCodes; ++code) {
            if ((code & 1) >= shorter.chunks) continue;
            const int op = code >> 1, stage = shorter.stage(rank, code & 1);
            for (int i = 0; i < longer.microbatches; ++i) {
                // Micro-batches past the cut keep their place in the turn, and their distance from the end.
                const int turns = i < cut ? 0 : i < cut + added ? (i - cut) / period : added / period;
                const int source = i < cut ? i : i < cut + added ? cut + (i - cut) % period : i - added;
                const double rest = i < cut + added ? 0.0 : turn / period * (added % period);
                times.emplace_back(replay.end(op, stage, source) - shorter.cost[op][stage] + turns * turn + rest, code);
            }
        }
        std::stable_sort(times.begin(), times.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
        for (const auto& [time, code] : times) out[rank].push_back(static_cast<std::uint8_t>(code));
    }
    return out;
}

}  // namespace pipekern::search
