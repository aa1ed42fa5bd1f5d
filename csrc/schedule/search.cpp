#include "schedule/search.h"

#include <algorithm>
#include <array>
#include <utility>

#include "schedule/search_fill.h"
#include "schedule/search_greedy.h"
#include "schedule/search_pattern.h"
#include "schedule/search_published.h"
#include "schedule/search_stretch.h"

namespace pipekern::search {

namespace {

constexpr int kBlocks = 16;       // block patterns that are tried
constexpr int kPeriods = 8;       // periods of a steady middle that are tried
constexpr double kStarts = 0.35;  // share of the work for starts; the rest goes into detours from the best
constexpr double kTies = 0.1;     // share of the work that may go into ties once the goal is reached

void reverse_rows(const Order& in, Order& out) {
    out = in;
    for (Row& row : out) std::reverse(row.begin(), row.end());
}

// Whether all durations are the same and messages cost nothing: then no gap is shorter than an action.
bool is_uniform(const Problem& problem) {
    for (const auto& costs : problem.cost)
        for (double cost : costs)
            if (cost != problem.cost[0][0]) return false;
    return std::all_of(problem.latency.begin(), problem.latency.end(), [](double l) { return l == 0; });
}

class Search {
  public:
    Search(const Problem& problem, const Goal& goal)
        : problem_(problem),
          goal_(goal),
          fill_(problem, !goal.makespan),
          greedy_(problem),
          replay_(problem),
          random_(1),
          uniform_(is_uniform(problem)) {}

    Found run() {
        published();
        if (problem_.microbatches > 3 * reduced() / 2) grow();
        start();
        detour();
        best_.work = work();
        return std::move(best_);
    }

  private:
    double first(const Score& s) const { return goal_.makespan ? s.makespan : s.span; }
    double second(const Score& s) const { return goal_.makespan ? s.span : s.makespan; }
    bool better(const Score& a, const Score& b) const {
        return first(a) < first(b) - kEpsilon || (first(a) < first(b) + kEpsilon && second(a) < second(b) - kEpsilon);
    }

    std::size_t work() const { return fill_.work() + scored_; }
    bool done(double share) const {
        const double spent = static_cast<double>(work()), all = share * static_cast<double>(goal_.work);
        if (first(best_.score) > first(goal_.good_enough) + kEpsilon) return spent >= all;
        return second(best_.score) <= second(goal_.good_enough) + kEpsilon || spent >= kTies * all;
    }

    Score score(const Order& order) {
        scored_ += problem_.actions() / 2;  // a replay costs about half of a fill
        const Score score = replay_.run(order);
        if (better(score, best_.score)) best_.score = score, best_.order = order;
        return score;
    }

    double patience() { return uniform_ ? 0.0 : 0.5 * random_.below(3); }

    // One pass backwards and one forwards; the better of the two orders is left in `order`.
    Score there_and_back(Order& order, double skip) {
        const FillRule free{patience(), 0.0}, loose{patience(), skip};
        reverse_rows(order, turned_);
        fill_.run(true, turned_, random_.below(2) ? loose : free, random_, back_);
        reverse_rows(back_, turned_);
        const Score late = score(turned_);
        fill_.run(false, turned_, free, random_, back_);
        const Score early = score(back_);
        std::swap(order, better(late, early) ? turned_ : back_);
        return better(late, early) ? late : early;
    }

    // Passes over `order` while they gain; leaves the best order there.
    Score polish(Order& order) {
        Score best = score(order);
        Order now = order;
        for (int idle = 0; idle < 2 && !done(1.0); ++idle) {
            const Score score = there_and_back(now, 0.0);
            if (!better(score, best)) continue;
            best = score;
            order = now;
            idle = -1;
        }
        return best;
    }

    bool fits(const Order& order) const { return peak(problem_, order) <= problem_.cap + kEpsilon; }

    void published() {
        std::vector<std::pair<Score, Order>> found;
        auto add = [&](Order order) {
            if (!fits(order)) return;
            const Score now = score(order);
            found.emplace_back(now, std::move(order));
        };
        for (Order& order : rule_orders(problem_)) add(std::move(order));
        if (problem_.chunks == 1) {
            Order order;
            for (int flags = 0; flags < 8; ++flags)
                if (heuristic_order(problem_, {(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0}, order))
                    add(order);
        }
        std::stable_sort(found.begin(), found.end(),
                         [&](const auto& a, const auto& b) { return better(a.first, b.first); });
        for (std::size_t i = 0; i < std::min<std::size_t>(2, found.size()); ++i)
            if (!done(kStarts)) polish(found[i].second);
        if (problem_.chunks == 2)
            for (Order& order : block_orders(problem_, kBlocks))
                if (!done(kStarts) && fits(order)) polish(order);
    }

    // Enough micro-batches for a start, a steady middle and an end.
    int reduced() const { return std::max(3 * problem_.ranks, 24); }

    // Searches with fewer micro-batches, then repeats the middle of what was found.
    void grow() {
        Problem shorter = problem_;
        shorter.microbatches = reduced();
        double busy = 0;
        for (int rank = 0; rank < problem_.ranks; ++rank) {
            double sum = 0;
            for (int code = 0; code < kCodes; ++code)
                if ((code & 1) < problem_.chunks) sum += problem_.duration(rank, code);
            busy = std::max(busy, sum);
        }
        busy *= problem_.microbatches - shorter.microbatches;
        Goal goal = goal_;
        goal.work = goal_.work / 3;
        goal.good_enough = {goal_.good_enough.span - busy, goal_.good_enough.makespan - busy};
        const Found found = Search(shorter, goal).run();
        scored_ += found.work;
        Order best;
        Score best_score;
        for (int period = 1; period <= kPeriods && !found.order.empty(); ++period)
            for (int shift = -1; shift < 3 && !done(0.8); ++shift) {
                const int cut = shorter.microbatches / 2 - period + shift * (period + 1) / 2;
                Order order = stretch(shorter, found.order, problem_, cut, period);
                if (!fits(order)) continue;
                const Score now = score(order);
                if (better(now, best_score)) best_score = now, best = std::move(order);
            }
        if (!best.empty()) polish(best);
    }

    struct Start {
        int order, backlog, slope;
    };

    std::vector<Start> starts() {
        std::vector<Start> all;
        const int orders = problem_.chunks == 1 ? 2 : 24;
        for (int order = 0; order < orders; ++order)
            for (int backlog = 0; backlog < 5; ++backlog)
                for (int slope = 0; slope < 2 * problem_.ranks; ++slope) all.push_back({order, backlog, slope});
        for (int i = static_cast<int>(all.size()) - 1; i > 0; --i) std::swap(all[i], all[random_.below(i + 1)]);
        if (problem_.chunks == 1) all.insert(all.begin(), {{0, 4, 0}, {0, 3, 0}, {0, 1, 3}, {1, 4, 3}, {0, 4, 4}});
        return all;
    }

    void start() {
        Order order;
        for (const Start& each : starts()) {
            if (done(kStarts) && !best_.order.empty()) return;
            if (greedy_.run(rule(each), order)) polish(order);
        }
    }

    GreedyRule rule(const Start& start) const {
        GreedyRule rule;
        if (problem_.chunks == 1) {
            rule.priority = start.order ? std::array<int, 4>{0, 2, 1, 3} : std::array<int, 4>{2, 0, 1, 3};
        } else {
            rule.priority = {0, 1, 2, 3};
            for (int i = 0; i < start.order; ++i) std::next_permutation(rule.priority.begin(), rule.priority.end());
        }
        if (start.backlog < 4) rule.backlog = start.backlog + 1;
        rule.warmup.assign(problem_.ranks, problem_.microbatches);
        for (int rank = 0; rank < problem_.ranks && start.slope > 0; ++rank)
            rule.warmup[rank] = std::max(1, static_cast<int>(problem_.cap) - (start.slope - 1) * rank / 2);
        return rule;
    }

    // Detours from the best order: passes that skip actions at random, kept where they are not worse.
    void detour() {
        if (best_.order.empty()) return;
        Order current = best_.order, order, again;
        Score score = best_.score;
        while (!done(1.0)) {
            const double skip = 0.3 / (1 + random_.below(30));
            order = current;
            if (random_.below(2)) {
                fill_.run(false, current, {patience(), skip}, random_, order);
            }
            Score now = there_and_back(order, skip);
            again = order;
            const Score then = there_and_back(again, 0.0);
            if (!better(now, then)) now = then, std::swap(order, again);
            if (!better(score, now) || random_.chance(0.02)) score = now, std::swap(current, order);
        }
    }

    const Problem& problem_;
    const Goal& goal_;
    Fill fill_;
    Greedy greedy_;
    Replay replay_;
    Random random_;
    const bool uniform_;
    Order turned_, back_;
    Found best_;
    std::size_t scored_ = 0;
};

}  // namespace

Found search(const Problem& problem, const Goal& goal) { return Search(problem, goal).run(); }

}  // namespace pipekern::search
