// The search over random problems: complete orders, within the cap, timed as a second simulator times them.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "schedule/search.h"
#include "schedule/search_published.h"
#include "schedule/search_stretch.h"

using namespace pipekern::search;

namespace {

Problem random_problem(Random& random) {
    Problem problem;
    problem.ranks = 1 + random.below(6);
    problem.microbatches = 1 + random.below(60);
    problem.chunks = 1 + random.below(2);
    problem.cap = problem.chunks + random.below(2 * problem.ranks);
    problem.kept = 0.25 * random.below(5);
    for (auto& cost : problem.cost)
        for (int stage = 0; stage < problem.stages(); ++stage) cost.push_back(1 + random.below(9));
    for (int stage = 0; stage < problem.stages(); ++stage) problem.latency.push_back(random.below(3));
    if (problem.chunks == 2) problem.latency[problem.ranks - 1] = 0;
    return problem;
}

// Ends of all actions, by sweeping over the ranks until nothing moves; returns span and makespan.
Score sweep(const Problem& problem, const Order& order) {
    const int stages = problem.stages();
    std::vector<std::vector<double>> end[3];
    for (auto& table : end) table.assign(stages, std::vector<double>(problem.microbatches, -1));
    std::vector<double> clock(problem.ranks), first(problem.ranks, -1);
    std::vector<std::size_t> at(problem.ranks);
    std::vector<std::vector<int>> count(problem.ranks, std::vector<int>(kCodes));
    for (bool moved = true; moved;) {
        moved = false;
        for (int rank = 0; rank < problem.ranks; ++rank) {
            if (at[rank] == order[rank].size()) continue;
            const int code = order[rank][at[rank]], op = code / 2, stage = problem.stage(rank, code % 2);
            const int i = count[rank][code];
            double ready = 0;
            auto need = [&](int from_op, int from, double late) {
                const double time = end[from_op][from][i];
                ready = time < 0 || ready < 0 ? -1 : std::max(ready, time + late);
            };
            if (op == kForward && stage > 0) need(kForward, stage - 1, problem.latency[stage - 1]);
            if (op == kBackward) need(kForward, stage, 0);
            if (op == kBackward && stage + 1 < stages) need(kBackward, stage + 1, problem.latency[stage]);
            if (op == kWeight) need(kBackward, stage, 0);
            if (ready < 0) continue;
            const double start = std::max(clock[rank], ready);
            if (at[rank] == 0) first[rank] = start;
            clock[rank] = end[op][stage][i] = start + problem.cost[op][stage];
            ++count[rank][code];
            ++at[rank];
            moved = true;
        }
    }
    Score score{0, 0};
    for (int rank = 0; rank < problem.ranks; ++rank) {
        CHECK(at[rank] == order[rank].size());
        score.span = std::max(score.span, clock[rank] - first[rank]);
        score.makespan = std::max(score.makespan, clock[rank]);
    }
    return score;
}

void test_random_problems() {
    Random random(7);
    for (int trial = 0; trial < 60; ++trial) {
        const Problem problem = random_problem(random);
        const Goal goal{random.below(2) == 1, {}, 20000};
        const Found found = search(problem, goal);
        CHECK(static_cast<int>(found.order.size()) == problem.ranks);
        for (const Row& row : found.order)
            for (int code = 0; code < kCodes; ++code)
                CHECK(std::count(row.begin(), row.end(), code) ==
                      (code % 2 < problem.chunks ? problem.microbatches : 0));
        CHECK(peak(problem, found.order) <= problem.cap + kEpsilon);
        const Score score = sweep(problem, found.order);
        CHECK(std::abs(score.span - found.score.span) < 1e-6);
        CHECK(std::abs(score.makespan - found.score.makespan) < 1e-6);
        CHECK(search(problem, goal).order == found.order);
        for (const Order& known : rule_orders(problem)) {
            if (peak(problem, known) > problem.cap + kEpsilon) continue;
            const Score other = Replay(problem).run(known);
            CHECK(goal.makespan ? score.makespan <= other.makespan + 1e-6 : score.span <= other.span + 1e-6);
        }
    }
}

// 1f1b is steady in its middle: one made longer is the longer one.
void test_stretch() {
    Problem shorter;
    shorter.ranks = 4;
    shorter.microbatches = 12;
    for (auto& cost : shorter.cost) cost.assign(4, 1.0);
    shorter.latency.assign(4, 0.0);
    shorter.cap = 4;
    Problem longer = shorter;
    longer.microbatches = 40;
    const Order made = stretch(shorter, rule_orders(shorter)[0], longer, 6, 1);
    CHECK(made == rule_orders(longer)[0]);
}

void test_deadlock_has_no_score() {
    Problem problem;
    problem.ranks = problem.microbatches = 1;
    for (auto& cost : problem.cost) cost.assign(1, 1.0);
    problem.latency.assign(1, 0.0);
    CHECK(Replay(problem).run({{2, 0, 4}}).span == kNever);
    CHECK(Replay(problem).run({{0, 2, 4}}).span == 3);
}

}  // namespace

int main() {
    test_random_problems();
    test_stretch();
    test_deadlock_has_no_score();
}
