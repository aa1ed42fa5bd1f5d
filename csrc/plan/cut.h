// The cheapest cut of a row of layers into stages under a limit on every stage's time.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace pipekern::plan {

using Int = __int128;

// `steps` that lead here: (node of the level before, device). `left` counts the devices that are not in use yet, by
// factor, the fastest first.
struct Node {
    std::vector<std::pair<std::int32_t, std::int32_t>> steps;
    std::vector<std::pair<Int, std::int32_t>> left;
};

// All cuts of a row of layers, as pipekern/plan/lattice.py has them: a stage of the layers a to b - 1 takes
// (done[b] - done[a]) × its device's factor + cuts[a] + cuts[b]. held[k] and caps are what memory allows, both empty
// where it does not matter. least_cuts[k] is what the cuts that are still to come after level k cost at least.
struct Lattice {
    std::vector<std::vector<Node>> levels;
    std::vector<Int> done, cuts, factors;
    std::vector<std::vector<Int>> held;
    std::vector<Int> caps, least_cuts;
};

struct Cut {
    std::vector<std::int32_t> bounds, devices;
    Int total;
};

// By level and node, bounds on the ends of its stages.
using Windows = std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>>;

// Among the cuts with stages of at most `limit` and a total below `budget` the one of the smallest total; none where
// there is none. The caller has checked that no total needs more than 126 bits.
std::optional<Cut> cheapest(const Lattice& lattice, const Windows& windows, Int limit, Int budget);

}  // namespace pipekern::plan
