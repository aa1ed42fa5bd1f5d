#include "schedule/search_fill.h"

#include <algorithm>

namespace pipekern::search {

namespace {
constexpr double kUnknown = -1.0;
}  // namespace

Fill::Fill(const Problem& problem, bool staggered)
    : problem_(problem),
      agenda_(problem.ranks),
      reach_(std::max(96, 6 * problem.ranks)),
      staggered_(staggered),
      following_(problem.ranks) {}

void Fill::reset(bool backwards, const Order& plan, Order& out) {
    const int p = problem_.ranks;
    const std::size_t cells = static_cast<std::size_t>(problem_.stages()) * problem_.microbatches;
    backwards_ = backwards;
    for (int code = 0; code < kCodes; ++code) gain_[code] = backwards ? -problem_.gain(code) : problem_.gain(code);
    for (auto& times : end_) times.assign(cells, kUnknown);
    held_.assign(p, 0.0);
    now_.assign(p, 0.0);
    count_.assign(p * kCodes, 0);
    finished_.assign(p, problem_.chunks == 1 ? 0b101010 : 0);
    out.resize(p);
    // Backwards, a rank begins later by as much as it begins earlier forwards: what counts is each rank's own span.
    if (backwards && staggered_)
        for (int rank = p - 2; rank >= 0; --rank)
            now_[rank] = now_[rank + 1] + problem_.cost[kForward][rank] + problem_.latency[rank];
    for (int rank = 0; rank < p; ++rank) {
        const int n = static_cast<int>(plan[rank].size());
        out[rank].clear();
        out[rank].reserve(n);
        following_[rank].resize(n + 1);
        for (int i = 0; i < n; ++i) following_[rank][i] = i + 1;
        following_[rank][n] = 0;
        agenda_.set(rank, now_[rank]);
    }
}

double Fill::ready(int rank, int code) const {
    const int op = code >> 1, stage = problem_.stage(rank, code & 1), last = problem_.stages() - 1;
    const int m = problem_.microbatches, n = count_[rank * kCodes + code];
    const std::size_t x = problem_.index(stage, backwards_ ? m - 1 - n : n);
    auto sent = [&](int sender_op, std::size_t index, int link) {
        double time = end_[sender_op][index];
        return time < 0 ? kUnknown : time + problem_.latency[link];
    };
    if (!backwards_) {
        if (op == kWeight) return end_[kBackward][x];
        if (op == kForward) return stage == 0 ? 0.0 : sent(kForward, x - m, stage - 1);
        if (stage == last || end_[kForward][x] < 0) return end_[kForward][x];
        return sent(kBackward, x + m, stage);
    }
    if (op == kWeight) return 0.0;
    if (op == kForward) {
        if (stage == last || end_[kBackward][x] < 0) return end_[kBackward][x];
        return sent(kForward, x + m, stage);
    }
    const double own = end_[kWeight][x];
    if (stage == 0 || own < 0) return own;
    const double other = sent(kBackward, x - m, stage - 1);
    return other < 0 ? kUnknown : std::max(own, other);
}

Fill::Choice Fill::choose(int rank, double now, const Row& plan, const FillRule& rule, Random& random) const {
    Choice choice, skipped;
    int seen = finished_[rank];
    double held = held_[rank], most = held, head = kUnknown;
    const auto& following = following_[rank];
    int steps = 0;
    for (int before = 0, at = following[0]; at && seen != 0b111111 && steps < reach_;
         before = at, at = following[at], ++steps) {
        const int code = plan[at - 1];
        if (!(seen >> code & 1)) {
            seen |= 1 << code;
            const double time = ready(rank, code);
            if (steps == 0) head = time;
            if (time >= 0 && (gain_[code] <= 0 || most + gain_[code] <= problem_.cap + kEpsilon)) {
                if (time > now) {
                    choice.next = std::min(choice.next, time);
                } else if (steps > 0 && head > now &&
                           head - now < rule.patience * problem_.duration(rank, code) - kEpsilon) {
                    // too long for the gap: the planned action comes first
                } else if (rule.skip > 0 && random.chance(rule.skip)) {
                    if (skipped.code < 0) skipped.code = code, skipped.before = before;
                } else {
                    choice.code = code, choice.before = before;
                    return choice;
                }
            }
        }
        held += gain_[code];
        most = std::max(most, held);
    }
    if (choice.next == kNever && skipped.code >= 0) return skipped;
    return choice;
}

void Fill::wake(int rank, double time) {
    time = std::max(time, now_[rank]);
    if (time < agenda_.at(rank)) agenda_.set(rank, time);
}

void Fill::start(int rank, int code, double now, Row& out) {
    const int op = code >> 1, stage = problem_.stage(rank, code & 1), m = problem_.microbatches;
    const int n = count_[rank * kCodes + code]++;
    if (n + 1 == m) finished_[rank] |= static_cast<std::uint8_t>(1 << code);
    const double end = now + problem_.cost[op][stage];
    out.push_back(static_cast<std::uint8_t>(code));
    held_[rank] += gain_[code];
    now_[rank] = end;
    agenda_.set(rank, end);
    end_[op][problem_.index(stage, backwards_ ? m - 1 - n : n)] = end;
    const bool up = (op == kForward) != backwards_;
    if (op == kWeight) return;
    if (up && stage < problem_.stages() - 1) wake(problem_.rank(stage + 1), end + problem_.latency[stage]);
    if (!up && stage > 0) wake(problem_.rank(stage - 1), end + problem_.latency[stage - 1]);
}

bool Fill::run(bool backwards, const Order& plan, const FillRule& rule, Random& random, Order& out) {
    reset(backwards, plan, out);
    std::size_t left = problem_.actions();
    work_ += left;
    while (left > 0) {
        const int rank = agenda_.first();
        const double now = agenda_.at(rank);
        if (now == kNever) return false;
        const Choice choice = choose(rank, now, plan[rank], rule, random);
        if (choice.code < 0) {
            agenda_.set(rank, choice.next);
            continue;
        }
        auto& following = following_[rank];
        following[choice.before] = following[following[choice.before]];
        start(rank, choice.code, now, out[rank]);
        --left;
    }
    return true;
}

}  // namespace pipekern::search
