#include <algorithm>
#include <utility>

#include "plan/pool.h"
#include "plan/prices.h"

namespace pipekern::plan {
namespace {

using I32 = std::int32_t;

constexpr Int kNone = -1;

std::size_t at(I32 index) { return static_cast<std::size_t>(index); }

// Of a state, and each end of its last stage from `low` on: the smallest total, its last stage's start, the row of the
// level before and the kind.
struct Row {
    I32 state = 0, low = 0;
    std::vector<Int> totals;
    std::vector<I32> starts, origins, kinds;

    Row(I32 state, I32 low, I32 size)
        : state(state), low(low), totals(at(size), kNone), starts(at(size)), origins(at(size)), kinds(at(size)) {}
    I32 beyond() const { return low + static_cast<I32>(totals.size()); }
};

class Beam {
  public:
    Beam(const Pool& pool, const Limited& limited, const Prices& prices, Int budget, std::size_t width)
        : pool_(pool), limited_(limited), prices_(prices), budget_(budget), width_(width), dropped_(budget) {
        rows_.emplace_back(1, Row(0, 0, 1)).front().totals[0] = 0;
        for (I32 level = 1; level <= pool.kinds().parts && !rows_.back().empty(); ++level) extend(level);
    }

    // No cut that was left out on the way has a smaller total.
    Int dropped() const { return dropped_; }

    std::optional<Cut> cut() const {
        const Row* last = nullptr;
        if (rows_.size() == at(pool_.kinds().parts) + 1)
            for (const Row& row : rows_.back())
                if (!last || row.totals.back() < last->totals.back()) last = &row;
        if (!last) return std::nullopt;
        Cut found{{pool_.layers()}, {}, last->totals.back()};
        for (std::size_t level = rows_.size() - 1; level > 0; --level) {
            const auto index = at(found.bounds.back() - last->low);
            found.bounds.push_back(last->starts[index]);
            found.devices.push_back(last->kinds[index]);
            last = &rows_[level - 1][at(last->origins[index])];
        }
        std::reverse(found.bounds.begin(), found.bounds.end());
        std::reverse(found.devices.begin(), found.devices.end());
        return found;
    }

  private:
    struct Step {
        I32 state, origin, kind;
        bool operator<(const Step& other) const { return state < other.state; }
    };

    void extend(I32 level) {
        const auto& before = rows_.back();
        std::vector<Step> steps;
        for (I32 origin = 0; origin < static_cast<I32>(before.size()); ++origin)
            for (std::size_t kind = 0; kind < pool_.size(); ++kind) {
                const I32 state = before[at(origin)].state;
                if (pool_.used(state, kind) < pool_.kinds().counts[kind])
                    steps.push_back({state + pool_.stride(kind), origin, static_cast<I32>(kind)});
            }
        std::stable_sort(steps.begin(), steps.end());
        std::vector<Row> made;
        bounds_.clear();
        for (auto step = steps.begin(); step != steps.end();) {
            const auto end = std::upper_bound(step, steps.end(), *step);
            Row row = empty(level, step, end, before);
            for (; step != end; ++step) enter(level, row, *step, before[at(step->origin)]);
            prune(level, row, budget_, nullptr);
            if (!row.totals.empty()) made.push_back(std::move(row));
        }
        if (bounds_.size() > width_) narrow(level, made);
        rows_.push_back(std::move(made));
    }

    // Of the ends that steps from `step` on may lead to.
    Row empty(I32 level, std::vector<Step>::iterator step, std::vector<Step>::iterator end,
              const std::vector<Row>& before) const {
        I32 first = pool_.layers(), last = -1;
        for (auto one = step; one != end; ++one) {
            const Row& origin = before[at(one->origin)];
            first = std::min(first, origin.low + 1);
            last = std::max(last, pool_.far(limited_, at(level), at(one->kind))[origin.beyond() - 1]);
        }
        first = std::max(first, limited_.low[at(step->state)]);
        last = std::min(last, limited_.high[at(step->state)]);
        return Row(step->state, first, std::max(0, last - first + 1));
    }

    // As in cut.cpp: the best start of a range that moves with the end, and the others where cuts make that too long.
    void enter(I32 level, Row& made, const Step& step, const Row& origin) {
        const auto kind = at(step.kind);
        const Kinds& kinds = pool_.kinds();
        const Int factor = kinds.factors[kind];
        const I32* near = pool_.near(limited_, at(level), kind);
        const auto cost = [&](I32 a) { return kinds.cuts[at(a)] - kinds.done[at(a)] * factor; };
        const auto total = [&](I32 a) { return origin.totals[at(a - origin.low)]; };
        const I32 last = pool_.far(limited_, at(level), kind)[origin.beyond() - 1];
        least_.clear();
        std::size_t head = 0;
        I32 seen = origin.low;
        for (I32 end = std::max(made.low, origin.low + 1); end < made.beyond() && end <= last; ++end) {
            for (; seen < std::min(end, origin.beyond()); ++seen) {
                if (total(seen) < 0) continue;
                const Int now = total(seen) + cost(seen);
                while (least_.size() > head && least_.back().first > now) least_.pop_back();
                least_.emplace_back(now, seen);
            }
            while (head < least_.size() && least_[head].second < near[end]) ++head;
            if (head == least_.size()) continue;
            const Int gain = kinds.done[at(end)] * factor + kinds.cuts[at(end)];
            auto [best, start] = least_[head];
            if (cost(start) + gain > limited_.limit) {
                start = -1;
                for (I32 a = std::max(near[end], origin.low); a < seen; ++a)
                    if (total(a) >= 0 && cost(a) + gain <= limited_.limit && (start < 0 || total(a) + cost(a) < best))
                        best = total(a) + cost(a), start = a;
                if (start < 0) continue;
            }
            const auto index = at(end - made.low);
            if (made.totals[index] >= 0 && made.totals[index] <= best + gain) continue;
            made.totals[index] = best + gain;
            made.starts[index] = start;
            made.origins[index] = step.origin;
            made.kinds[index] = step.kind;
        }
    }

    // Takes out the ends whose bound is not below `limit`, but for as many that are just there as there is `room` for;
    // and what is empty at both sides. Notes the bounds where there is no `room` to speak of.
    void prune(I32 level, Row& row, Int limit, std::size_t* room) {
        const Int refund = prices_.refund(row.state, level);
        I32 first = row.beyond(), last = row.low - 1;
        for (I32 end = row.low; end < row.beyond(); ++end) {
            Int& total = row.totals[at(end - row.low)];
            if (total < 0) continue;
            const Int bound = prices_.bound(total, level, end, refund);
            const bool tied = room && bound == limit && *room > 0;
            if (bound >= limit && !tied) {
                total = kNone;
                continue;
            }
            if (tied) --*room;
            if (!room) bounds_.push_back(bound);
            first = std::min(first, end);
            last = end;
        }
        const auto trim = [&](auto& values) {
            values.erase(values.begin() + (last + 1 - row.low), values.end());
            values.erase(values.begin(), values.begin() + std::min(first - row.low, static_cast<I32>(values.size())));
        };
        trim(row.totals), trim(row.starts), trim(row.origins), trim(row.kinds);
        row.low = first;
    }

    // Keeps the `width` ends of the smallest bounds.
    void narrow(I32 level, std::vector<Row>& made) {
        const auto place = bounds_.begin() + static_cast<std::ptrdiff_t>(width_);
        std::nth_element(bounds_.begin(), place, bounds_.end());
        const Int limit = *place;
        std::size_t room = width_;
        for (auto bound = bounds_.begin(); bound != place; ++bound) room -= *bound < limit;
        dropped_ = std::min(dropped_, limit);
        for (Row& row : made) prune(level, row, limit, &room);
        made.erase(std::remove_if(made.begin(), made.end(), [](const Row& row) { return row.totals.empty(); }),
                   made.end());
    }

    const Pool& pool_;
    const Limited& limited_;
    const Prices& prices_;
    Int budget_;
    std::size_t width_;
    Int dropped_;
    std::vector<std::vector<Row>> rows_;
    std::vector<Int> bounds_;
    std::vector<std::pair<Int, I32>> least_;  // of the starts in range: each with a later one that is dearer
};

}  // namespace

Int Pool::least_total(Int limit, Int budget) const {
    const Limited at = limited(limit);
    return std::min(budget, Prices(*this, at, budget).bound());
}

Found Pool::cheapest(Int limit, Int budget, std::size_t width) const {
    Limited at = limited(limit);
    if (!forward(at) || !backward(at)) return {std::nullopt, budget};
    const Prices prices(*this, at, budget);
    const Beam beam(*this, at, prices, budget, width);
    Found found{beam.cut(), beam.dropped()};
    if (found.cut) found.least = std::min(found.least, found.cut->total);
    found.least = std::max(found.least, std::min(budget, prices.bound()));
    return found;
}

}  // namespace pipekern::plan
