// Published orders as starts, so that a search is never worse than any of them that fits the cap.
#pragma once

#include "schedule/search_problem.h"

namespace pipekern::search {

// One chunk: gpipe, 1f1b, zb-h1, zb-h2 and warm-ups between them. V placement: zb-v.
std::vector<Order> rule_orders(const Problem& problem);

// The zero-bubble heuristic (Zero Bubble Pipeline Parallelism, section 3.1) with one combination of its flags.
struct HeuristicFlags {
    bool idle_before_first_backward = false;  // warm up as long as an F ends before the first B can start, not longer
    bool backward_first = false;              // leave an F out where it would hold up the next rank's B
    bool weight_in_small_gaps = true;         // W also in gaps shorter than W that do not raise the largest bubble
};

// One chunk a rank only. False where the heuristic does not fit the cap.
bool heuristic_order(const Problem& problem, const HeuristicFlags& flags, Order& out);

}  // namespace pipekern::search
