// Exact times of an order: every action starts as soon as its rank and its input allow.
#pragma once

#include "schedule/search_problem.h"

namespace pipekern::search {

struct Score {
    double span = kNever;      // largest over ranks of last end minus first start
    double makespan = kNever;  // from 0 to the last end
};

class Replay {
  public:
    explicit Replay(const Problem& problem);
    // Scores the order; both fields are infinite where it deadlocks.
    Score run(const Order& order);
    double end(int op, int stage, int microbatch) const { return end_[op][problem_.index(stage, microbatch)]; }

  private:
    void advance(int rank, const Row& row);
    double arrival(int op, int stage, std::size_t index) const;

    const Problem& problem_;
    std::vector<double> end_[3];
    std::vector<double> first_, last_;
    std::vector<int> position_, count_, runnable_;
    std::vector<std::size_t> blocker_;
};

// The most activations that any rank holds.
double peak(const Problem& problem, const Order& order);

}  // namespace pipekern::search
