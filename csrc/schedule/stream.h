// Builds and simulates 1f1b, zb-h1 and zb-h2 together, straight from their rules, so that no action is ever stored.
#pragma once

#include <cstdint>
#include <vector>

namespace pipekern {

enum class StreamRule { kOneFOneB, kZbH1, kZbH2 };

// One value a rank, in ticks; `comm` has one value for each pair of neighbours.
struct StreamCosts {
    std::vector<std::int64_t> forward, backward, weight, comm;
};

// What one rank did. `held` activations were whole (between F and B) and `shrunk` ones were reduced (between B and W)
// when it held the most.
struct StreamRank {
    std::int64_t first_start = 0, last_end = 0, busy = 0, held = 0, shrunk = 0;
};

// The exact times of a step; the caller has checked that every time fits in 63 bits and that there is one cost a rank.
// Time grows with ranks × microbatches, memory with ranks.
std::vector<StreamRank> stream(StreamRule rule, std::int64_t microbatches, const StreamCosts& costs);

}  // namespace pipekern
