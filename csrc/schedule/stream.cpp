#include "schedule/stream.h"

#include <algorithm>
#include <stdexcept>

namespace pipekern {
namespace {

using i64 = std::int64_t;

// Messages that a rank may be ahead of its neighbour in the order of computing, not in simulated time. Two are enough
// for every rule here: no rank's warm-up exceeds its successor's by more than two forwards, and a rank that waits for
// room cannot wait for a rank that waits for it. More make fewer sweeps; 8 keep 4096 ranks in a 1 MB cache.
constexpr i64 kRing = 8;

// One rank: how far it is in its program, and the messages that wait for it.
struct Rank {
    i64 clock = 0;
    i64 forwards = 0, backwards = 0, weights = 0;  // actions done
    i64 warm_up = 0, lag = 0;                      // the rule: forwards ahead, weights behind
    i64 forward_cost = 0, backward_cost = 0, weight_cost = 0;
    i64 to_next = 0, to_previous = 0;  // latency of its links
    StreamRank out;
    i64 activation[kRing] = {}, gradient[kRing] = {};  // arrival times
};

template <bool kSplit>
class Stream {
  public:
    Stream(std::vector<Rank>& ranks, i64 microbatches)
        : ranks_(ranks), last_(static_cast<i64>(ranks.size()) - 1), microbatches_(microbatches) {}

    // Up the ranks and down again, every rank as far as it can go, until all are done.
    void run() {
        for (bool more = true; more;) {
            bool moved = false;
            more = false;
            for (i64 r = 0; r <= last_; ++r) moved |= advance(r);
            for (i64 r = last_; r >= 0; --r) {
                moved |= advance(r);
                more |= ranks_[r].weights < microbatches_;
            }
            if (more && !moved) throw std::logic_error("stream: no rank can go on");
        }
    }

  private:
    bool advance(i64 r) {
        Rank& rank = ranks_[r];
        bool moved = false;
        while (kSplit ? one_split(rank, r) : one_whole(rank, r)) moved = true;
        return moved;
    }

    // W as soon as `lag` backwards are ahead of it; F while fewer than warm_up + 1 are in flight; else B; W at last.
    bool one_split(Rank& rank, i64 r) {
        if (rank.backwards - rank.weights > rank.lag) return weight(rank);
        if (rank.forwards < microbatches_ && rank.forwards <= rank.warm_up + rank.backwards) return forward(rank, r);
        if (rank.backwards < microbatches_) return backward(rank, r, rank.backward_cost);
        return rank.weights < microbatches_ && weight(rank);
    }

    bool one_whole(Rank& rank, i64 r) {
        if (rank.forwards < microbatches_ && rank.forwards <= rank.warm_up + rank.backwards) return forward(rank, r);
        if (rank.backwards == microbatches_ || !backward(rank, r, rank.backward_cost + rank.weight_cost)) return false;
        ++rank.weights;
        return true;
    }

    bool forward(Rank& rank, i64 r) {
        const i64 k = rank.forwards;
        const i64 slot = k % kRing;
        if (r > 0 && ranks_[r - 1].forwards == k) return false;
        if (r < last_ && k - ranks_[r + 1].forwards == kRing) return false;
        const i64 start = std::max(rank.clock, rank.activation[slot]);
        if (k == 0) rank.out.first_start = start;
        spend(rank, start, rank.forward_cost);
        if (r < last_) ranks_[r + 1].activation[slot] = rank.clock + rank.to_next;
        ++rank.forwards;
        // Neither number ever falls from one forward to the next, so the last forward has the peak whatever `kept` is.
        rank.out.held = rank.forwards - rank.backwards;
        rank.out.shrunk = rank.backwards - rank.weights;
        return true;
    }

    bool backward(Rank& rank, i64 r, i64 cost) {
        const i64 k = rank.backwards;
        const i64 slot = k % kRing;
        if (r < last_ && ranks_[r + 1].backwards == k) return false;
        if (r > 0 && k - ranks_[r - 1].backwards == kRing) return false;
        spend(rank, std::max(rank.clock, rank.gradient[slot]), cost);
        if (r > 0) ranks_[r - 1].gradient[slot] = rank.clock + rank.to_previous;
        ++rank.backwards;
        return true;
    }

    bool weight(Rank& rank) {
        spend(rank, rank.clock, rank.weight_cost);
        ++rank.weights;
        return true;
    }

    static void spend(Rank& rank, i64 start, i64 cost) {
        rank.clock = start + cost;
        rank.out.busy += cost;
    }

    std::vector<Rank>& ranks_;
    const i64 last_;
    const i64 microbatches_;
};

}  // namespace

std::vector<StreamRank> stream(StreamRule rule, i64 microbatches, const StreamCosts& costs) {
    const i64 count = static_cast<i64>(costs.forward.size());
    const i64 ahead = rule == StreamRule::kZbH2 ? 2 : 1;
    std::vector<Rank> ranks(count);
    for (i64 r = 0; r < count; ++r) {
        ranks[r].warm_up = ahead * (count - r - 1);
        ranks[r].lag = ahead * r;
        ranks[r].forward_cost = costs.forward[r];
        ranks[r].backward_cost = costs.backward[r];
        ranks[r].weight_cost = costs.weight[r];
        if (r + 1 < count) ranks[r].to_next = costs.comm[r];
        if (r > 0) ranks[r].to_previous = costs.comm[r - 1];
    }
    if (rule == StreamRule::kOneFOneB)
        Stream<false>(ranks, microbatches).run();
    else
        Stream<true>(ranks, microbatches).run();
    std::vector<StreamRank> out;
    for (Rank& rank : ranks) {
        rank.out.last_end = rank.clock;
        out.push_back(rank.out);
    }
    return out;
}

}  // namespace pipekern
