#include "schedule/search_published.h"

#include <algorithm>

namespace pipekern::search {

namespace {

constexpr std::uint8_t kF0 = 0, kF1 = 1, kB0 = 2, kB1 = 3, kW0 = 4, kW1 = 5;

// `warmup` forwards, then one forward and one backward in turn; W follows `delay` micro-batches behind its B.
Row one_by_one(int microbatches, int warmup, int delay) {
    Row row;
    int forward = 0, weight = 0;
    while (forward < std::min(warmup, microbatches)) row.push_back(kF0), ++forward;
    for (int backward = 0; backward < microbatches;) {
        if (forward < microbatches) row.push_back(kF0), ++forward;
        row.push_back(kB0), ++backward;
        if (backward - weight > delay) row.push_back(kW0), ++weight;
    }
    while (weight < microbatches) row.push_back(kW0), ++weight;
    return row;
}

Row zb_v(int ranks, int rank, int microbatches) {
    Row row;
    int count[kCodes] = {};
    auto add = [&](std::initializer_list<std::uint8_t> codes) {
        for (std::uint8_t code : codes)
            if (count[code] < microbatches) row.push_back(code), ++count[code];
    };
    for (int i = 0; i < 2 * (ranks - rank) - 1; ++i) add({kF0});
    for (int i = 0; i < rank; ++i) add({kF1, kF0});
    for (int i = 0; i < ranks - rank; ++i) add({kF1, kB1, kW1});
    while (count[kF1] < count[kF0] || count[kF0] < microbatches) add({kF0, kB0, kW0, kF1, kB1, kW1});
    for (int i = 0; i < rank; ++i) add({kB0, kB1});
    for (int i = 0; i < ranks - rank; ++i) add({kB0, kW0});
    while (count[kW1] < microbatches) add({kB1, kW1});
    while (count[kW0] < microbatches) add({kB0, kW0});
    return row;
}

class Heuristic {
  public:
    Heuristic(const Problem& problem, const HeuristicFlags& flags, Order& out)
        : problem_(problem), flags_(flags), out_(out), state_(problem.ranks) {
        for (int op = 0; op < 2; ++op)
            end_[op].assign(static_cast<std::size_t>(problem.ranks) * problem.microbatches, 0.0);
        out_.assign(problem.ranks, {});
    }

    bool run() {
        warm_up();
        for (int i = 1; i < problem_.microbatches; ++i) {
            forwards();
            backwards(i);
        }
        for (int rank = 0; rank < problem_.ranks; ++rank)
            while (state_[rank].count[kWeight] < problem_.microbatches) put(rank, kWeight);
        return fits_;
    }

  private:
    struct Rank {
        int count[3] = {};
        double end = 0, held = 0, bubble = 0;
    };

    double cost(int rank, int op) const { return problem_.cost[op][rank]; }
    double end(int op, int rank, int i) const { return end_[op][problem_.index(rank, i)]; }
    bool room(int rank) const { return state_[rank].held + 1 <= problem_.cap + kEpsilon; }
    double largest_bubble() const {
        double most = 0;
        for (const Rank& rank : state_) most = std::max(most, rank.bubble);
        return most;
    }

    // When the input of the next action is there; 0 where it comes from the rank itself.
    double arrival(int rank, int op) const {
        const int i = state_[rank].count[op];
        if (op == kForward && rank > 0) return end(kForward, rank - 1, i) + problem_.latency[rank - 1];
        if (op == kBackward && rank < problem_.ranks - 1) return end(kBackward, rank + 1, i) + problem_.latency[rank];
        return 0;
    }

    void put(int rank, int op) {
        Rank& r = state_[rank];
        const double start = std::max(r.end, arrival(rank, op));
        if (r.count[kForward] > 0) r.bubble += start - r.end;
        r.end = start + cost(rank, op);
        if (op != kWeight) end_[op][problem_.index(rank, r.count[op])] = r.end;
        r.held += problem_.gain(2 * op);
        ++r.count[op];
        out_[rank].push_back(static_cast<std::uint8_t>(2 * op));
    }

    bool weight_waits(int rank) const { return state_[rank].count[kWeight] < state_[rank].count[kBackward]; }

    // W in the gap before the next action `op`.
    void fill_gap(int rank, int op) {
        const double until = arrival(rank, op);
        while (weight_waits(rank) && state_[rank].end + cost(rank, kWeight) <= until) put(rank, kWeight);
        if (!weight_waits(rank) || state_[rank].end >= until) return;
        const bool hidden = until - state_[rank].end <= largest_bubble() - state_[rank].bubble;
        if (!hidden || flags_.weight_in_small_gaps) put(rank, kWeight);
    }

    void warm_up() {
        const int p = problem_.ranks, m = problem_.microbatches;
        for (int rank = 0; rank < p; ++rank) put(rank, kForward);
        std::vector<int> extra(p, 0);
        double gradient = state_[p - 1].end + cost(p - 1, kBackward);
        for (int rank = p - 2; rank >= 0; --rank) {
            const double arrives = gradient + problem_.latency[rank];
            double held = state_[rank].held, now = state_[rank].end;
            while (1 + extra[rank] < m && held + 1 <= problem_.cap + kEpsilon) {
                const bool late =
                    flags_.idle_before_first_backward ? now + cost(rank, kForward) > arrives : now >= arrives;
                if (late) break;
                held += 1;
                now += cost(rank, kForward);
                ++extra[rank];
            }
            gradient = std::max(now, arrives) + cost(rank, kBackward);
        }
        for (int rank = 1; rank < p; ++rank)
            if (1 + extra[rank] < m) extra[rank] = std::min(extra[rank], std::max(0, extra[rank - 1] - 1));
        for (int rank = 0; rank < p; ++rank)
            for (int i = 0; i < extra[rank]; ++i) put(rank, kForward);
        for (int rank = p - 1; rank >= 0; --rank) put(rank, kBackward);
    }

    // Whether `rank` is better off without its next F, because the next rank's B would come late.
    bool leaves_out(int rank) const {
        if (!flags_.backward_first || rank + 1 == problem_.ranks) return false;
        const Rank &r = state_[rank], &next = state_[rank + 1];
        if (r.count[kForward] < next.count[kForward] + 2) return false;
        const double due = next.end + cost(rank + 1, kForward) + cost(rank + 1, kBackward) + problem_.latency[rank];
        if (r.end >= due) return true;
        double held = r.held + 1, weights = 0;
        for (int n = r.count[kWeight]; held > problem_.cap + kEpsilon && n < r.count[kBackward]; ++n) {
            weights += cost(rank, kWeight);
            held += problem_.gain(2 * kWeight);
        }
        if (r.end + cost(rank, kForward) + weights <= due) return false;
        return due - r.end <= largest_bubble() - r.bubble;
    }

    void forwards() {
        const int p = problem_.ranks;
        std::vector<char> wanted(p);
        for (int rank = 0; rank < p; ++rank)
            wanted[rank] = state_[rank].count[kForward] < problem_.microbatches && !leaves_out(rank);
        for (int rank = p - 2; rank >= 0; --rank) wanted[rank] = wanted[rank] && wanted[rank + 1];
        for (int rank = 0; rank < p && fits_; ++rank) {
            if (!wanted[rank]) continue;
            while (!room(rank) && weight_waits(rank)) put(rank, kWeight);
            fits_ = room(rank);
            if (rank > 0) fill_gap(rank, kForward);
            put(rank, kForward);
        }
    }

    void backwards(int i) {
        for (int rank = problem_.ranks - 1; rank >= 0 && fits_; --rank) {
            fits_ = state_[rank].count[kForward] > i;
            if (rank < problem_.ranks - 1) fill_gap(rank, kBackward);
            if (rank == 0 && state_[0].count[kForward] == problem_.microbatches)
                while (weight_waits(0)) put(0, kWeight);
            put(rank, kBackward);
        }
    }

    const Problem& problem_;
    const HeuristicFlags& flags_;
    Order& out_;
    std::vector<Rank> state_;
    std::vector<double> end_[2];
    bool fits_ = true;
};

}  // namespace

std::vector<Order> rule_orders(const Problem& problem) {
    const int p = problem.ranks, m = problem.microbatches;
    std::vector<Order> orders;
    auto add = [&](auto&& row_of) {
        orders.emplace_back();
        for (int rank = 0; rank < p; ++rank) orders.back().push_back(row_of(rank));
    };
    if (problem.chunks == 2) {
        add([&](int rank) { return zb_v(p, rank, m); });
        return orders;
    }
    add([&](int rank) { return one_by_one(m, p - rank - 1, 0); });
    add([&](int rank) { return one_by_one(m, p - rank - 1, rank); });
    add([&](int rank) { return one_by_one(m, 2 * (p - rank - 1), 2 * rank); });
    add([&](int) { return one_by_one(m, m, 0); });
    return orders;
}

bool heuristic_order(const Problem& problem, const HeuristicFlags& flags, Order& out) {
    return Heuristic(problem, flags, out).run();
}

}  // namespace pipekern::search
