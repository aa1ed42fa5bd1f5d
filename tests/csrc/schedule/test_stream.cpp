// Stream against a table of all results, filled by asking over and over which rank can go on.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "schedule/stream.h"

using namespace pipekern;
using i64 = std::int64_t;
using Table = std::vector<std::vector<i64>>;

namespace {

struct Action {
    char op;
    i64 microbatch;
};

// The order of one rank as the rule says it: warm-up, then F, B and, from pair `lag` on, W; then what is left.
std::vector<Action> row(bool whole, i64 warm_up, i64 lag, i64 microbatches) {
    std::vector<Action> out;
    i64 f = 0, b = 0, w = 0;
    while (f < std::min(warm_up, microbatches)) out.push_back({'F', f++});
    while (b < microbatches) {
        if (f < microbatches) out.push_back({'F', f++});
        out.push_back({'B', b++});
        if (whole || b - w > lag) out.push_back({'W', w++});
    }
    while (w < microbatches) out.push_back({'W', w++});
    return out;
}

void require(bool good, const std::string& what) {
    if (good) return;
    std::fprintf(stderr, "failed: %s\n", what.c_str());
    std::exit(1);
}

// Ends of the rows, and first starts, with the whole tables of results in memory.
void compare(StreamRule rule, i64 count, i64 microbatches, const StreamCosts& costs) {
    const bool whole = rule == StreamRule::kOneFOneB;
    const i64 ahead = rule == StreamRule::kZbH2 ? 2 : 1;
    std::vector<std::vector<Action>> rows;
    for (i64 r = 0; r < count; ++r) rows.push_back(row(whole, ahead * (count - r - 1), ahead * r, microbatches));
    Table output(count, std::vector<i64>(microbatches, -1)), gradient = output;
    std::vector<i64> clock(count), busy(count);
    std::vector<std::size_t> at(count);
    for (bool moved = true; moved;) {
        moved = false;
        for (i64 r = 0; r < count; ++r) {
            if (at[r] == rows[r].size()) continue;
            const auto [op, k] = rows[r][at[r]];
            i64 ready = 0;
            if (op == 'F' && r > 0) ready = output[r - 1][k] < 0 ? -1 : output[r - 1][k] + costs.comm[r - 1];
            if (op == 'B' && r + 1 < count) ready = gradient[r + 1][k] < 0 ? -1 : gradient[r + 1][k] + costs.comm[r];
            if (ready < 0) continue;
            i64 cost = op == 'F' ? costs.forward[r] : op == 'B' ? costs.backward[r] : costs.weight[r];
            clock[r] = std::max(clock[r], ready) + cost;
            // A whole backward hands its gradient on at its end, weights and all.
            if (op == 'F') output[r][k] = clock[r];
            if (op == 'B') gradient[r][k] = clock[r] + (whole ? costs.weight[r] : 0);
            busy[r] += cost;
            ++at[r];
            moved = true;
        }
    }
    const auto got = stream(rule, microbatches, costs);
    for (i64 r = 0; r < count; ++r) {
        const std::string where = std::to_string(r) + " of " + std::to_string(count);
        require(at[r] == rows[r].size(), "the table is full at rank " + where);
        require(got[r].last_end == clock[r], "end of rank " + where);
        require(got[r].busy == busy[r], "busy time of rank " + where);
    }
}

}  // namespace

int main() {
    std::mt19937_64 random(std::random_device{}());
    const auto values = [&](i64 count) {
        std::vector<i64> out(count);
        for (i64& value : out) value = static_cast<i64>(random() % 100);
        return out;
    };
    for (StreamRule rule : {StreamRule::kOneFOneB, StreamRule::kZbH1, StreamRule::kZbH2})
        for (i64 ranks : {1, 2, 3, 5, 16})
            for (i64 microbatches : {1, 2, 7, 40})
                compare(rule, ranks, microbatches, {values(ranks), values(ranks), values(ranks), values(ranks - 1)});
    std::puts("stream: all equal");
}
