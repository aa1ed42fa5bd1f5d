#include "plan/cut.h"

#include <algorithm>
#include <deque>

namespace pipekern::plan {
namespace {

constexpr Int kNone = -1;

// Of each end of a node's stage from `low` on: the smallest total, and the start and the step that led there.
struct Row {
    std::int32_t low = 0;
    std::vector<Int> totals;
    std::vector<std::int32_t> starts, steps;

    std::int32_t beyond() const { return low + static_cast<std::int32_t>(totals.size()); }
};

// The least time in which devices do an amount of work if it could be split at will: the fastest do all they can.
class Filling {
  public:
    Filling(const std::vector<std::pair<Int, std::int32_t>>& devices, Int limit) {
        Int work = 0, time = 0;
        for (const auto& [factor, count] : devices) {
            parts_.push_back({work, time, factor});
            work += limit / factor * count;
            time += limit / factor * count * factor;
        }
    }
    Int least(Int amount) const {
        if (amount == 0 || parts_.empty()) return 0;
        auto part = std::upper_bound(parts_.begin(), parts_.end(), amount,
                                     [](Int value, const Part& one) { return value < one.work; });
        --part;
        return part->time + (amount - part->work) * part->factor;
    }

  private:
    struct Part {
        Int work, time, factor;
    };
    std::vector<Part> parts_;
};

// How far stages of one factor go: from a to b fits only where entry[b] - exit[a] <= limit. Both only grow.
struct Reach {
    std::vector<Int> exit, entry;

    Reach(const Lattice& lattice, Int factor) : exit(lattice.done.size()), entry(lattice.done.size()) {
        for (std::size_t a = 0; a < exit.size(); ++a) {
            const Int own = lattice.done[a] * factor - lattice.cuts[a];
            exit[a] = a ? std::max(exit[a - 1], own) : own;
        }
        for (std::size_t b = entry.size(); b-- > 0;) {
            const Int own = lattice.done[b] * factor + lattice.cuts[b];
            entry[b] = b + 1 < entry.size() ? std::min(entry[b + 1], own) : own;
        }
    }
};

class Table {
  public:
    Table(const Lattice& lattice, const Windows& windows, Int limit, Int budget)
        : lattice_(lattice), limit_(limit), budget_(budget) {
        for (const Int factor : lattice.factors) reach_.emplace_back(lattice, factor);
        rows_.push_back({Row{0, {0}, {-1}, {-1}}});
        for (std::size_t k = 1; k < lattice.levels.size(); ++k) {
            std::vector<Row> level;
            for (std::size_t node = 0; node < lattice.levels[k].size(); ++node)
                level.push_back(row(k, node, windows[k][node]));
            rows_.push_back(std::move(level));
        }
    }

    std::optional<Cut> cut() const {
        const std::int32_t layers = static_cast<std::int32_t>(lattice_.done.size()) - 1;
        std::size_t node = 0;
        Int total = kNone;
        for (std::size_t i = 0; i < rows_.back().size(); ++i) {
            const Row& last = rows_.back()[i];
            if (last.beyond() != layers + 1 || last.totals.empty() || last.totals.back() < 0) continue;
            if (total < 0 || last.totals.back() < total) total = last.totals.back(), node = i;
        }
        if (total < 0) return std::nullopt;
        Cut found{{layers}, {}, total};
        for (std::size_t k = rows_.size() - 1; k > 0; --k) {
            const Row& at = rows_[k][node];
            const auto index = static_cast<std::size_t>(found.bounds.back() - at.low);
            const auto [origin, device] = lattice_.levels[k][node].steps[static_cast<std::size_t>(at.steps[index])];
            found.bounds.push_back(at.starts[index]);
            found.devices.push_back(device);
            node = static_cast<std::size_t>(origin);
        }
        std::reverse(found.bounds.begin(), found.bounds.end());
        std::reverse(found.devices.begin(), found.devices.end());
        return found;
    }

  private:
    Row row(std::size_t k, std::size_t node, std::pair<std::int32_t, std::int32_t> window) const {
        Row made;
        made.low = window.first;
        const auto size = static_cast<std::size_t>(std::max(0, window.second - window.first + 1));
        made.totals.assign(size, kNone);
        made.starts.assign(size, -1);
        made.steps.assign(size, -1);
        const auto& steps = lattice_.levels[k][node].steps;
        for (std::size_t step = 0; step < steps.size(); ++step)
            extend(k, made, static_cast<std::int32_t>(step), rows_[k - 1][static_cast<std::size_t>(steps[step].first)],
                   static_cast<std::size_t>(steps[step].second));
        prune(k, node, made);
        return made;
    }

    // Enters into `made` what a stage on `device` after `origin` gives. A stage from a to b takes gain[b] + cost[a]:
    // the best a has the smallest total + cost in a range that moves with b. Only where that one is too long because of
    // its cut are the others tried.
    void extend(std::size_t k, Row& made, std::int32_t step, const Row& origin, std::size_t device) const {
        const Int factor = lattice_.factors[device];
        const auto cost = [&](std::int32_t a) { return lattice_.cuts[at(a)] - lattice_.done[at(a)] * factor; };
        const auto value = [&](std::int32_t a) { return origin.totals[at(a - origin.low)] + cost(a); };
        std::deque<std::pair<Int, std::int32_t>> least;  // of the starts in range: each with a later one that is dearer
        std::int32_t first = origin.low, seen = origin.low;
        for (std::int32_t end = std::max(made.low, origin.low + 1); end < made.beyond(); ++end) {
            while (first < end && too_far(k, first, end, device)) ++first;
            for (; seen < std::min(end, origin.beyond()); ++seen) {
                if (origin.totals[at(seen - origin.low)] < 0) continue;
                const Int now = value(seen);
                while (!least.empty() && least.back().first > now) least.pop_back();
                least.emplace_back(now, seen);
            }
            while (!least.empty() && least.front().second < first) least.pop_front();
            if (least.empty()) continue;
            const Int gain = lattice_.done[at(end)] * factor + lattice_.cuts[at(end)];
            auto [best, start] = least.front();
            if (cost(start) + gain > limit_) {
                start = -1;
                for (std::int32_t a = first; a < seen; ++a) {
                    if (origin.totals[at(a - origin.low)] < 0 || cost(a) + gain > limit_) continue;
                    if (start < 0 || value(a) < best) best = value(a), start = a;
                }
                if (start < 0) continue;
            }
            Int& known = made.totals[at(end - made.low)];
            if (known < 0 || best + gain < known) {
                known = best + gain;
                made.starts[at(end - made.low)] = start;
                made.steps[at(end - made.low)] = step;
            }
        }
    }

    // Whether no stage from `start` or before to `end` or after can be short and small enough.
    bool too_far(std::size_t k, std::int32_t start, std::int32_t end, std::size_t device) const {
        if (reach_[device].exit[at(start)] < reach_[device].entry[at(end)] - limit_) return true;
        if (lattice_.held.empty()) return false;
        const auto& held = lattice_.held[k - 1];
        return held[at(end)] - held[at(start)] > lattice_.caps[device];
    }

    // Drops the ends from which the rest cannot stay below the budget.
    void prune(std::size_t k, std::size_t node, Row& made) const {
        const Filling filling(lattice_.levels[k][node].left, limit_);
        const bool last = k + 1 == lattice_.levels.size();
        for (std::int32_t end = made.low; end < made.beyond(); ++end) {
            Int& total = made.totals[at(end - made.low)];
            const Int cut = last ? 0 : lattice_.cuts[at(end)];
            const Int rest = filling.least(lattice_.done.back() - lattice_.done[at(end)]);
            if (total >= 0 && total + cut + rest + lattice_.least_cuts[k] >= budget_) total = kNone;
        }
    }

    static std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

    const Lattice& lattice_;
    Int limit_, budget_;
    std::vector<Reach> reach_;  // by device
    std::vector<std::vector<Row>> rows_;
};

}  // namespace

std::optional<Cut> cheapest(const Lattice& lattice, const Windows& windows, Int limit, Int budget) {
    return Table(lattice, windows, limit, budget).cut();
}

}  // namespace pipekern::plan
