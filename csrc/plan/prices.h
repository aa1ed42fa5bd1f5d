// Prices of devices, under which the shortest path through the layers bounds every cut that uses what there is.
#pragma once

#include <vector>

#include "plan/pool.h"

namespace pipekern::plan {

// Lagrange's relaxation of the numbers of devices: a stage pays the price of its device, and what all the devices of a
// cut pay is given back. ahead[b] is the least that the layers from b on take with prices, wherever they are cut and
// however many devices that needs; by level where memory is by position. kEndless where nothing leads to the end.
class Prices {
  public:
    // The best prices for the limit: the bound is concave in them. Stops where it reaches the budget.
    Prices(const Pool& pool, const Limited& limited, Int budget);

    // No cut has a smaller total.
    Int bound() const;

    // What a cut takes at least that has come to `end` in `state` for `total` without prices.
    Int bound(Int total, std::int32_t level, std::int32_t end, Int refund) const {
        const Int rest = ahead(level)[static_cast<std::size_t>(end)];
        return rest == kEndless ? kEndless : total + rest - refund;
    }

    // The most that the devices of a cut can pay which are still to come.
    Int refund(std::int32_t state, std::int32_t level) const;

  private:
    const std::vector<Int>& ahead(std::int32_t level) const { return ahead_[pool_.by_level() ? level : 0]; }

    const Pool& pool_;
    std::vector<Int> prices_;
    std::vector<std::vector<Int>> ahead_;
};

}  // namespace pipekern::plan
