// Memory-safe list scheduling along a planned order, forwards or backwards in time.
#pragma once

#include "schedule/search_agenda.h"
#include "schedule/search_problem.h"

namespace pipekern::search {

struct FillRule {
    double patience = 0.0;  // an action is pulled before the planned one if the gap is this share of it, or more
    double skip = 0.0;      // probability of passing over an action that could run
};

class Fill {
  public:
    Fill(const Problem& problem, bool staggered);
    // Runs `plan` (rows in the direction of time) and writes the order it came to. False where it deadlocks,
    // which a plan within the cap cannot.
    bool run(bool backwards, const Order& plan, const FillRule& rule, Random& random, Order& out);
    std::size_t work() const { return work_; }

  private:
    struct Choice {
        int code = -1;
        int before = 0;
        double next = kNever;
    };
    void reset(bool backwards, const Order& plan, Order& out);
    double ready(int rank, int code) const;
    Choice choose(int rank, double now, const Row& plan, const FillRule& rule, Random& random) const;
    void start(int rank, int code, double now, Row& out);
    void wake(int rank, double time);

    const Problem& problem_;
    Agenda agenda_;
    const int reach_;       // how far along the plan an action is looked for
    const bool staggered_;  // backwards, ranks begin one after another
    bool backwards_ = false;
    double gain_[kCodes] = {};
    std::vector<double> end_[3];
    std::vector<double> held_, now_;
    std::vector<int> count_;
    std::vector<std::uint8_t> finished_;       // codes without a further action, as a bit set
    std::vector<std::vector<int>> following_;  // a linked list of plan positions, counted from 1; 0 is its head
    std::size_t work_ = 0;
};

}  // namespace pipekern::search
