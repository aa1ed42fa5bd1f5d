// List scheduling by a fixed priority of operations: where the search starts from.
#pragma once

#include <array>

#include "schedule/search_agenda.h"
#include "schedule/search_problem.h"

namespace pipekern::search {

struct GreedyRule {
    std::array<int, 4> priority{3, 2, 1, 0};  // of the codes F0, F1, B0, B1: the first one that can run does
    int backlog = 1 << 30;                    // W goes before F when so many of them wait
    std::vector<int> warmup;                  // by rank: the most micro-batches of chunk 0 between F and B
};

class Greedy {
  public:
    explicit Greedy(const Problem& problem);
    // False where the rule deadlocks.
    bool run(const GreedyRule& rule, Order& out);

  private:
    struct Choice {
        int code = -1;
        double next = kNever;
    };
    double ready(int rank, int code) const;
    bool fits(int rank, int code, const GreedyRule& rule) const;
    Choice choose(int rank, double now, const GreedyRule& rule) const;
    void wake(int rank, double time);

    const Problem& problem_;
    Agenda agenda_;
    std::vector<double> end_[2];
    std::vector<double> held_, now_;
    std::vector<int> count_;
};

}  // namespace pipekern::search
