// The search for an order: published orders, block patterns and greedy starts, improved backwards and forwards in
// time, then by random detours from the best.
#pragma once

#include "schedule/search_problem.h"
#include "schedule/search_replay.h"

namespace pipekern::search {

struct Goal {
    bool makespan = false;        // minimise the makespan first and then the span, not the other way round
    Score good_enough{0.0, 0.0};  // where the search may end
    std::size_t work = 0;         // actions that it may schedule: the same result on every machine
};

struct Found {
    Order order;  // empty where nothing fits the cap
    Score score;
    std::size_t work = 0;
};

// The best order found: never over the cap, and never worse than the orders of search_published.h that fit it.
Found search(const Problem& problem, const Goal& goal);

}  // namespace pipekern::search
