// The search's view of a pipeline: one or two chunks a rank, and orders as rows of operation codes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace pipekern::search {

enum Op : int { kForward = 0, kBackward = 1, kWeight = 2 };

// A code is 2 * op + chunk. The n-th occurrence of a code in a row is micro-batch n: equal micro-batches gain
// nothing from overtaking one another.
constexpr int kCodes = 6;
using Row = std::vector<std::uint8_t>;
using Order = std::vector<Row>;

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kEpsilon = 1e-9;

struct Problem {
    int ranks = 0;
    int microbatches = 0;
    int chunks = 1;               // 2: V placement, rank r holds stages r and 2 * ranks - 1 - r
    double cap = 0;               // activations of one chunk that a rank may hold
    double kept = 1;              // share of an activation that stays from B to W
    std::vector<double> cost[3];  // by op, then stage
    std::vector<double> latency;  // from stage s to s + 1, and back; 0 where both are on one rank

    int stages() const { return ranks * chunks; }
    int rank(int stage) const { return stage < ranks ? stage : 2 * ranks - 1 - stage; }
    int stage(int rank, int chunk) const { return chunk ? 2 * ranks - 1 - rank : rank; }
    double duration(int rank, int code) const { return cost[code >> 1][stage(rank, code & 1)]; }
    // What a code adds to the activations its rank holds.
    double gain(int code) const {
        int op = code >> 1;
        return op == kForward ? 1.0 : op == kBackward ? kept - 1.0 : -kept;
    }
    std::size_t index(int stage, int microbatch) const {
        return static_cast<std::size_t>(stage) * microbatches + microbatch;
    }
    std::size_t actions() const { return std::size_t(3) * stages() * microbatches; }
};

// splitmix64: the same numbers on every machine.
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t next() {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>((next() >> 33) % static_cast<std::uint64_t>(n)); }
    bool chance(double probability) { return static_cast<double>(next() >> 11) * 0x1.0p-53 < probability; }

  private:
    std::uint64_t state_;
};

}  // namespace pipekern::search
