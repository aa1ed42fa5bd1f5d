#include "schedule/search_replay.h"

#include <algorithm>

namespace pipekern::search {

namespace {
constexpr double kUnknown = -1.0;
constexpr std::size_t kNothing = static_cast<std::size_t>(-1);
}  // namespace

Replay::Replay(const Problem& problem) : problem_(problem), blocker_(problem.ranks) {}

// When the input of an action is there; kUnknown where its sender has not run.
double Replay::arrival(int op, int stage, std::size_t index) const {
    const int m = problem_.microbatches;
    if (op == kWeight) return end_[kBackward][index];
    if (op == kForward) {
        if (stage == 0) return 0.0;
        double sent = end_[kForward][index - m];
        return sent < 0 ? kUnknown : sent + problem_.latency[stage - 1];
    }
    if (stage == problem_.stages() - 1 || end_[kForward][index] < 0) return end_[kForward][index];
    double sent = end_[kBackward][index + m];
    return sent < 0 ? kUnknown : sent + problem_.latency[stage];
}

void Replay::advance(int rank, const Row& row) {
    const int stages = problem_.stages();
    double now = last_[rank];
    std::size_t k = position_[rank];
    for (; k < row.size(); ++k) {
        const int code = row[k], op = code >> 1, stage = problem_.stage(rank, code & 1);
        const std::size_t x = problem_.index(stage, count_[rank * kCodes + code]);
        const double ready = arrival(op, stage, x);
        if (ready < 0) {
            const bool remote = op == kForward ? stage > 0 : op == kBackward && stage < stages - 1;
            if (remote)
                blocker_[rank] = op == kForward ? 2 * (x - problem_.microbatches) : 2 * (x + problem_.microbatches) + 1;
            break;
        }
        const double start = std::max(now, ready);
        if (k == 0) first_[rank] = start;
        now = start + problem_.cost[op][stage];
        end_[op][x] = now;
        ++count_[rank * kCodes + code];
        const int next = op == kForward ? stage + 1 : op == kBackward ? stage - 1 : -1;
        if (next < 0 || next == stages) continue;
        const int peer = problem_.rank(next);
        if (blocker_[peer] == 2 * x + op) {
            blocker_[peer] = kNothing;
            runnable_.push_back(peer);
        }
    }
    position_[rank] = static_cast<int>(k);
    last_[rank] = now;
}

Score Replay::run(const Order& order) {
    const int p = problem_.ranks;
    const std::size_t cells = static_cast<std::size_t>(problem_.stages()) * problem_.microbatches;
    for (auto& times : end_) times.assign(cells, kUnknown);
    first_.assign(p, 0.0);
    last_.assign(p, 0.0);
    position_.assign(p, 0);
    count_.assign(p * kCodes, 0);
    std::fill(blocker_.begin(), blocker_.end(), kNothing);
    runnable_.clear();
    for (int rank = p - 1; rank >= 0; --rank) runnable_.push_back(rank);
    while (!runnable_.empty()) {
        const int rank = runnable_.back();
        runnable_.pop_back();
        advance(rank, order[rank]);
    }
    Score score{0.0, 0.0};
    for (int rank = 0; rank < p; ++rank) {
        if (position_[rank] < static_cast<int>(order[rank].size())) return {};
        score.span = std::max(score.span, last_[rank] - first_[rank]);
        score.makespan = std::max(score.makespan, last_[rank]);
    }
    return score;
}

double peak(const Problem& problem, const Order& order) {
    double most = 0.0;
    for (const Row& row : order) {
        double held = 0.0;
        for (int code : row) {
            held += problem.gain(code);
            most = std::max(most, held);
        }
    }
    return most;
}

}  // namespace pipekern::search
