#include "schedule/search_greedy.h"

#include <algorithm>

namespace pipekern::search {

namespace {
constexpr double kUnknown = -1.0;
constexpr int kF0 = 0, kB0 = 2, kB1 = 3, kW0 = 4, kW1 = 5;
}  // namespace

Greedy::Greedy(const Problem& problem) : problem_(problem), agenda_(problem.ranks) {}

double Greedy::ready(int rank, int code) const {
    const int op = code >> 1, stage = problem_.stage(rank, code & 1), m = problem_.microbatches;
    const std::size_t x = problem_.index(stage, count_[rank * kCodes + code]);
    if (op == kForward) {
        if (stage == 0) return 0.0;
        const double sent = end_[kForward][x - m];
        return sent < 0 ? kUnknown : sent + problem_.latency[stage - 1];
    }
    if (stage == problem_.stages() - 1 || end_[kForward][x] < 0) return end_[kForward][x];
    const double sent = end_[kBackward][x + m];
    return sent < 0 ? kUnknown : sent + problem_.latency[stage];
}

bool Greedy::fits(int rank, int code, const GreedyRule& rule) const {
    if (held_[rank] + 1 > problem_.cap + kEpsilon) return false;
    if (code != kF0) return true;
    const int* count = &count_[rank * kCodes];
    if (count[kF0] - count[kB0] >= rule.warmup[rank]) return false;
    // Chunk 1 keeps room for one activation: without it a rank full of chunk 0 never gets its gradients.
    return problem_.chunks == 1 || count[kF0] - count[kW0] + 2 <= problem_.cap + kEpsilon;
}

Greedy::Choice Greedy::choose(int rank, double now, const GreedyRule& rule) const {
    Choice choice;
    const int* count = &count_[rank * kCodes];
    bool full = false;
    for (int code : rule.priority) {
        if ((code & 1) >= problem_.chunks || count[code] == problem_.microbatches) continue;
        const double time = ready(rank, code);
        if (time < 0) continue;
        if (code >> 1 == kForward && !fits(rank, code, rule)) {
            full = true;
            continue;
        }
        if (time <= now) {
            choice.code = code;
            break;
        }
        choice.next = std::min(choice.next, time);
    }
    const int waiting0 = count[kB0] - count[kW0], waiting1 = count[kB1] - count[kW1];
    if (waiting0 + waiting1 == 0) return choice;
    const int weight = waiting0 >= waiting1 ? kW0 : kW1;
    const bool gap = choice.code < 0 && (full || choice.next >= now + problem_.duration(rank, weight) - kEpsilon);
    const bool late = choice.code >= 0 && choice.code >> 1 == kForward && waiting0 + waiting1 >= rule.backlog;
    if (gap || late) choice.code = weight;
    return choice;
}

void Greedy::wake(int rank, double time) {
    time = std::max(time, now_[rank]);
    if (time < agenda_.at(rank)) agenda_.set(rank, time);
}

bool Greedy::run(const GreedyRule& rule, Order& out) {
    const int p = problem_.ranks, stages = problem_.stages(), m = problem_.microbatches;
    for (auto& times : end_) times.assign(static_cast<std::size_t>(stages) * m, kUnknown);
    held_.assign(p, 0.0);
    now_.assign(p, 0.0);
    count_.assign(p * kCodes, 0);
    out.resize(p);
    for (int rank = 0; rank < p; ++rank) {
        out[rank].clear();
        agenda_.set(rank, 0.0);
    }
    std::size_t left = problem_.actions();
    while (left > 0) {
        const int rank = agenda_.first();
        const double now = agenda_.at(rank);
        if (now == kNever) return false;
        const Choice choice = choose(rank, now, rule);
        if (choice.code < 0) {
            agenda_.set(rank, choice.next);
            continue;
        }
        const int code = choice.code, op = code >> 1, stage = problem_.stage(rank, code & 1);
        const double end = now + problem_.cost[op][stage];
        out[rank].push_back(static_cast<std::uint8_t>(code));
        held_[rank] += problem_.gain(code);
        now_[rank] = end;
        if (op != kWeight) end_[op][problem_.index(stage, count_[rank * kCodes + code])] = end;
        ++count_[rank * kCodes + code];
        agenda_.set(rank, end);
        if (op == kForward && stage < stages - 1) wake(problem_.rank(stage + 1), end + problem_.latency[stage]);
        if (op == kBackward && stage > 0) wake(problem_.rank(stage - 1), end + problem_.latency[stage - 1]);
        --left;
    }
    return true;
}

}  // namespace pipekern::search
