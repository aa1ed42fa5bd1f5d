#include "schedule/search_pattern.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

namespace pipekern::search {

namespace {

constexpr int kPeriod = 6;
constexpr int kF0 = 0, kF1 = 1, kB0 = 2, kB1 = 3, kW0 = 4, kW1 = 5;

using Times = std::array<int, kCodes>;  // of micro-batch 0 on one rank, by code
using Block = std::vector<Times>;

int residue(int time) { return ((time % kPeriod) + kPeriod) % kPeriod; }
// The first time not before `from` at `place` of the period.
int next_at(int from, int place) { return from + residue(place - from); }

// Gives W the first free place after its B; false where two of the others collide.
bool place_weights(Times& t) {
    std::array<bool, kPeriod> taken{};
    for (int code : {kF0, kF1, kB0, kB1}) {
        if (taken[residue(t[code])]) return false;
        taken[residue(t[code])] = true;
    }
    for (auto [b, w] : {std::pair{kB1, kW1}, std::pair{kB0, kW0}}) {
        t[w] = t[b] + 1;
        while (taken[residue(t[w])]) ++t[w];
        taken[residue(t[w])] = true;
    }
    return true;
}

// Chunk 0's forward and chunk 1's backward move down by `step` up to rank `turn`, by `later` after it.
bool make_block(int ranks, int f1, int b1, int b0, int step, int later, int turn, Block& block) {
    std::vector<int> shift(ranks, 0);
    for (int r = 1; r < ranks; ++r) shift[r] = shift[r - 1] + (r <= turn ? step : later);
    const int last = ranks - 1;
    for (int r = 0; r < ranks; ++r) block[r][kF0] = shift[r];
    block[last][kF1] = next_at(block[last][kF0] + 1, f1 - last);
    for (int r = last - 1; r >= 0; --r) block[r][kF1] = block[r + 1][kF1] + 1;
    block[0][kB1] = next_at(block[0][kF1] + 1, b1);
    for (int r = 1; r < ranks; ++r) block[r][kB1] = block[0][kB1] + shift[r];
    block[last][kB0] = next_at(block[last][kB1] + 1, b0 - last);
    for (int r = last - 1; r >= 0; --r) block[r][kB0] = block[r + 1][kB0] + 1;
    for (Times& times : block)
        if (!place_weights(times)) return false;
    return true;
}

// Activations that a rank holds when the block runs steadily.
int steady(const Times& t) {
    int most = 0;
    for (int now = 0; now < kPeriod; ++now) {
        int held = 0;
        for (int chunk = 0; chunk < 2; ++chunk) {
            // An activation lives in the slots from its F to its W, both included.
            const int begin = t[kF0 + chunk], end = t[kW0 + chunk];
            held += (end - begin + residue(begin - now)) / kPeriod + (residue(begin - now) == 0 ? 1 : 0);
        }
        most = std::max(most, held);
    }
    return most;
}

Order to_order(const Block& block, int microbatches) {
    Order order;
    std::vector<std::pair<int, int>> times;
    for (const Times& t : block) {
        times.clear();
        for (int code = 0; code < kCodes; ++code)
            for (int i = 0; i < microbatches; ++i) times.emplace_back(t[code] + kPeriod * i, code);
        std::sort(times.begin(), times.end());
        order.emplace_back();
        for (const auto& [time, code] : times) order.back().push_back(static_cast<std::uint8_t>(code));
    }
    return order;
}

}  // namespace

std::vector<Order> block_orders(const Problem& problem, std::size_t most) {
    const int p = problem.ranks;
    std::vector<std::pair<int, Block>> found;
    std::set<Block> seen;
    Block block(p);
    const int stride = std::max(1, p / 16);
    std::array<int, 5> places{1, 2, 3, 4, 5};
    for (int f1 : places)
        for (int b1 : places)
            for (int b0 : places)
                for (int step : places)
                    for (int later = 1; later <= step; ++later)
                        for (int turn = 1; turn < p; turn += stride) {
                            if (f1 == b1 || f1 == b0 || b1 == b0) continue;
                            if (!make_block(p, f1, b1, b0, step, later, turn, block)) continue;
                            int held = 0;
                            for (const Times& times : block) held = std::max(held, steady(times));
                            if (held <= problem.cap + kEpsilon && seen.insert(block).second)
                                found.emplace_back(-held, block);
                        }
    std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    if (found.size() > most) found.resize(most);
    std::vector<Order> orders;
    for (const auto& [held, each] : found) orders.push_back(to_order(each, problem.microbatches));
    return orders;
}

}  // namespace pipekern::search
