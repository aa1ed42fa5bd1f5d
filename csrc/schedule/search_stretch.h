// A longer order from a shorter one: a piece of its steady middle is repeated.
#pragma once

#include "schedule/search_problem.h"

namespace pipekern::search {

// The order of `longer` in which micro-batches `cut` … `cut + period - 1` of `order` come again and again, and the
// later ones follow in their turn. It may exceed the cap or deadlock where the middle is not steady.
Order stretch(const Problem& shorter, const Order& order, const Problem& longer, int cut, int period);

}  // namespace pipekern::search
