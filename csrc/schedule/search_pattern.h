// Starts for V placement from blocks of period 6, one micro-batch a block: F0, F1, B1, B0 at fixed places on every
// rank, which move by a constant from rank to rank; W takes the places that are left.
#pragma once

#include "schedule/search_problem.h"

namespace pipekern::search {

// The orders of all such blocks that hold no more than the cap once they run steadily, most memory first.
std::vector<Order> block_orders(const Problem& problem, std::size_t most);

}  // namespace pipekern::search
