// When each rank decides next: the smallest time, then the smallest rank, in O(log ranks).
#pragma once

#include <utility>
#include <vector>

#include "schedule/search_problem.h"

namespace pipekern::search {

class Agenda {
  public:
    explicit Agenda(int ranks) {
        while (width_ < ranks) width_ *= 2;
        time_.assign(width_, kNever);
        winner_.resize(2 * width_);
        for (int i = 0; i < width_; ++i) winner_[width_ + i] = i;
        for (int i = width_ - 1; i > 0; --i) winner_[i] = winner_[2 * i];
    }
    double at(int rank) const { return time_[rank]; }
    int first() const { return winner_[1]; }
    void set(int rank, double time) {
        time_[rank] = time;
        for (int node = (width_ + rank) / 2; node > 0; node /= 2) {
            const int left = winner_[2 * node], right = winner_[2 * node + 1];
            const int winner = time_[right] < time_[left] ? right : left;
            if (winner == winner_[node] && winner != rank) return;  // nothing changes above
            winner_[node] = winner;
        }
    }

  private:
    int width_ = 1;
    std::vector<double> time_;
    std::vector<int> winner_;
};

}  // namespace pipekern::search
