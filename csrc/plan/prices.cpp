#include "plan/prices.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace pipekern::plan {
namespace {

using I32 = std::int32_t;

constexpr int kTries = 150;
constexpr double kClose = 1e-6;  // of the bound: prices are not sought any nearer

std::size_t at(I32 index) { return static_cast<std::size_t>(index); }

// Of each start the least that the rest takes, with where the first stage then ends and the kind that has it.
template <class T>
struct Paths {
    std::vector<T> ahead;
    std::vector<I32> to;
    std::vector<std::size_t> kind;

    Paths(std::size_t size, T endless) : ahead(size, endless), to(size, -1), kind(size, 0) {}
};

template <class T>
struct Line {
    std::vector<std::vector<T>> work;  // before each layer, by kind
    std::vector<T> cuts;
    T endless;

    Line(const Kinds& kinds, T endless) : cuts(kinds.cuts.begin(), kinds.cuts.end()), endless(endless) {
        for (const Int factor : kinds.factors) {
            auto& row = work.emplace_back();
            for (const Int done : kinds.done) row.push_back(static_cast<T>(done * factor));
        }
    }

    // Fills in the starts from `last` down to `first`, of stages after which `next` is still to come; it may be the
    // same.
    template <class Far>
    void relax(const std::vector<T>& prices, const Far& far, I32 first, I32 last, const std::vector<T>& next,
               Paths<T>& made) const {
        std::vector<std::vector<std::pair<T, I32>>> least(prices.size());  // of the ends in range: each with an earlier
        std::vector<std::size_t> head(prices.size());                      // one that is dearer
        for (I32 start = last; start >= first; --start)
            for (std::size_t kind = 0; kind < prices.size(); ++kind) {
                auto& ends = least[kind];
                if (const T rest = next[at(start + 1)]; rest < endless) {
                    const T now = work[kind][at(start + 1)] + cuts[at(start + 1)] + rest;
                    while (ends.size() > head[kind] && ends.back().first >= now) ends.pop_back();
                    ends.emplace_back(now, start + 1);
                }
                while (head[kind] < ends.size() && ends[head[kind]].second > far(kind)[start]) ++head[kind];
                if (head[kind] == ends.size()) continue;
                const auto& [now, end] = ends[head[kind]];
                const T whole = now - work[kind][at(start)] + cuts[at(start)] + prices[kind];
                if (whole >= made.ahead[at(start)]) continue;
                made.ahead[at(start)] = whole;
                made.to[at(start)] = end;
                made.kind[at(start)] = kind;
            }
    }
};

// The most that `count` of the devices that are left pay: those of the highest prices.
template <class T>
T dearest(const std::vector<T>& prices, std::vector<I32> left, I32 count, std::vector<double>* use = nullptr) {
    std::vector<std::size_t> order(prices.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return prices[a] > prices[b]; });
    T sum = 0;
    for (const std::size_t kind : order) {
        const I32 some = std::min(count, left[kind]);
        sum += prices[kind] * some;
        if (use) (*use)[kind] = some;
        count -= some;
    }
    return sum;
}

// Where a concave function is largest, by the ellipsoid method with deep cuts (M. Grötschel, L. Lovász, A. Schrijver,
// Geometric Algorithms and Combinatorial Optimization, 1988): `x` is its centre, `slope` one of the function there.
class Ellipsoid {
  public:
    Ellipsoid(std::vector<double> x, double radius) : x(std::move(x)), shape_(this->x.size()) {
        for (std::size_t i = 0; i < shape_.size(); ++i) {
            shape_[i].assign(shape_.size(), 0);
            shape_[i][i] = radius * radius;
        }
    }

    // Leaves out where the function cannot be above `best`; false where nothing is left, or what it may gain is small.
    bool shrink(const std::vector<double>& slope, double value, double best) {
        const auto size = shape_.size();
        const auto n = static_cast<double>(size);
        std::vector<double> along(size, 0);
        double width = 0;
        for (std::size_t i = 0; i < size; ++i) {
            for (std::size_t j = 0; j < size; ++j) along[i] += shape_[i][j] * slope[j];
            width += along[i] * slope[i];
        }
        width = std::sqrt(width);
        if (!(width > 0) || value + width - best < kClose * std::abs(best)) return false;
        const double depth = (best - value) / width;
        if (depth >= 1) return false;
        const double scale = n * n * (1 - depth * depth) / (n * n - 1);
        const double cut = 2 * (1 + n * depth) / ((n + 1) * (1 + depth) * width * width);
        for (std::size_t i = 0; i < size; ++i) {
            x[i] += (1 + n * depth) / ((n + 1) * width) * along[i];
            for (std::size_t j = 0; j < size; ++j) shape_[i][j] = scale * (shape_[i][j] - cut * along[i] * along[j]);
        }
        return true;
    }

    std::vector<double> x;

  private:
    std::vector<std::vector<double>> shape_;
};

// What work would be worth on a faster device if it could be split at will: that it takes there off the slowest in use.
std::vector<double> first_guess(const Kinds& kinds, double limit) {
    std::vector<std::size_t> order(kinds.counts.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return kinds.factors[a] < kinds.factors[b]; });
    double rest = static_cast<double>(kinds.done.back()), slowest = 0;
    for (const std::size_t kind : order) {
        if (rest <= 0) break;
        slowest = static_cast<double>(kinds.factors[kind]);
        rest -= limit / slowest * kinds.counts[kind];
    }
    const double layer = static_cast<double>(kinds.done.back()) / static_cast<double>(kinds.done.size() - 1);
    std::vector<double> prices;
    for (const Int value : kinds.factors) {
        const auto factor = static_cast<double>(value);
        prices.push_back((slowest - factor) * (factor < slowest ? limit / factor : layer));
    }
    return prices;
}

// The longest stages from each layer on, by kind, at the position that has most room.
std::vector<std::vector<I32>> loosest(const Pool& pool, const Limited& at) {
    std::vector<std::vector<I32>> far;
    for (std::size_t kind = 0; kind < pool.size(); ++kind) {
        auto& row = far.emplace_back(static_cast<std::size_t>(pool.layers()) + 1, -1);
        for (I32 level = 1; level <= (pool.by_level() ? pool.kinds().parts : 1); ++level)
            for (std::size_t a = 0; a < row.size(); ++a)
                row[a] = std::max(row[a], pool.far(at, static_cast<std::size_t>(level), kind)[a]);
    }
    return far;
}

std::vector<double> best_prices(const Pool& pool, const Limited& limited, Int budget) {
    const Kinds& kinds = pool.kinds();
    const auto limit = static_cast<double>(limited.limit);
    const Line<double> line(kinds, HUGE_VAL);
    const auto far = loosest(pool, limited);
    const auto row = [&](std::size_t kind) { return far[kind].data(); };
    Ellipsoid within(first_guess(kinds, limit), limit);
    std::vector<double> prices = within.x;
    double best = -HUGE_VAL;
    for (int tries = 0; tries < kTries; ++tries) {
        Paths<double> paths(kinds.done.size(), HUGE_VAL);
        paths.ahead.back() = 0;
        line.relax(within.x, row, 0, pool.layers() - 1, paths.ahead, paths);
        if (paths.ahead[0] == HUGE_VAL) break;
        std::vector<double> slope(prices.size(), 0);
        const double value = paths.ahead[0] - dearest(within.x, kinds.counts, kinds.parts, &slope);
        for (double& use : slope) use = -use;
        for (I32 start = 0; start < pool.layers(); start = paths.to[at(start)]) slope[paths.kind[at(start)]] += 1;
        if (value > best) best = value, prices = within.x;
        if (best >= static_cast<double>(budget) || !within.shrink(slope, value, best)) break;
    }
    return prices;
}

}  // namespace

Prices::Prices(const Pool& pool, const Limited& limited, Int budget) : pool_(pool) {
    const Kinds& kinds = pool.kinds();
    const double most = 4 * static_cast<double>(limited.limit);
    for (const double price : best_prices(pool, limited, budget))
        prices_.push_back(static_cast<Int>(std::clamp(price, -most, most)));
    const Line<Int> line(kinds, kEndless);
    Paths<Int> paths(kinds.done.size(), kEndless);
    paths.ahead.back() = 0;
    if (!pool.by_level()) {
        const auto far = [&](std::size_t kind) { return pool.far(limited, 1, kind); };
        line.relax(prices_, far, 0, pool.layers() - 1, paths.ahead, paths);
        ahead_.push_back(std::move(paths.ahead));
        return;
    }
    ahead_.assign(at(kinds.parts) + 1, paths.ahead);
    for (I32 level = kinds.parts - 1; level >= 0; --level) {
        const auto far = [&](std::size_t kind) { return pool.far(limited, at(level) + 1, kind); };
        Paths<Int> before(kinds.done.size(), kEndless);
        line.relax(prices_, far, level, pool.layers() - kinds.parts + level, ahead_[at(level) + 1], before);
        ahead_[at(level)] = std::move(before.ahead);
    }
}

Int Prices::bound() const { return bound(0, 0, 0, refund(0, 0)); }

Int Prices::refund(I32 state, I32 level) const {
    std::vector<I32> left;
    for (std::size_t kind = 0; kind < pool_.size(); ++kind)
        left.push_back(pool_.kinds().counts[kind] - pool_.used(state, kind));
    return dearest(prices_, std::move(left), pool_.kinds().parts - level);
}

}  // namespace pipekern::plan
