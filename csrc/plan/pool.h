// A row of layers, and devices of a few kinds that may stand in any order: how far stages reach under a limit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "plan/cut.h"

namespace pipekern::plan {

constexpr Int kEndless = Int{1} << 126;

// `counts` devices of each kind, `parts` of them in use, one a stage. Otherwise as a Lattice: a stage of the layers a
// to b - 1 takes (done[b] - done[a]) × its kind's factor + cuts[a] + cuts[b]; held[k] by position and caps by kind are
// what memory allows, both empty where it does not matter.
struct Kinds {
    std::int32_t parts = 0;
    std::vector<std::int32_t> counts;
    std::vector<Int> done, cuts, factors;
    std::vector<std::vector<Int>> held;
    std::vector<Int> caps;
};

// Whether a limit on stages may do; and if so the least limit that surely gives this answer too, else the first that
// may give another one.
struct Reached {
    bool may;
    Int edge;
};

// The cut of the smallest total that was seen, its devices being kinds. No cut under the limit has a total below
// `least` (the budget, where none is below that): a cut whose total is `least` is the best.
struct Found {
    std::optional<Cut> cut;
    Int least;
};

// What a limit allows. Ends and starts are those of the longest stages wherever cuts cost least, so they are bounds.
// `high` and `low` are by state: the last and the first end at which a cut may be, high < low where none may be.
struct Limited {
    Int limit;
    std::vector<std::int32_t> far, near, high, low;
};

// A state is how many devices of each kind are in use, as one number: there are Π(count + 1).
class Pool {
  public:
    explicit Pool(Kinds kinds);

    // Necessary for stages of at most `limit`, not sufficient: as if stages could be empty, and wherever cuts cost
    // least.
    Reached reaches(Int limit) const;

    // No cut with stages of at most `limit` has a smaller total; the budget where none is below that.
    Int least_total(Int limit, Int budget) const;

    // The cut of the smallest total among those with stages of at most `limit` and a total below `budget`, or a bound:
    // at each level the `width` (state, end) of the smallest bounds are kept.
    Found cheapest(Int limit, Int budget, std::size_t width) const;

    const Kinds& kinds() const { return kinds_; }
    std::int32_t layers() const { return static_cast<std::int32_t>(kinds_.done.size()) - 1; }
    std::size_t size() const { return kinds_.counts.size(); }

    // Rows of `far` and `near`: from a layer and to a layer, for a kind and the stage at a level. One more than there
    // are layers, and one before: far[-1] is -1, near[layers + 1] layers + 1.
    const std::int32_t* far(const Limited& at, std::size_t level, std::size_t kind) const {
        return at.far.data() + place(level, kind) + 1;
    }
    const std::int32_t* near(const Limited& at, std::size_t level, std::size_t kind) const {
        return at.near.data() + place(level, kind) + 1;
    }
    bool by_level() const { return mem_far_.size() > 0; }

    std::int32_t states() const { return states_; }
    std::int32_t stride(std::size_t kind) const { return strides_[kind]; }
    std::int32_t used(std::int32_t state, std::size_t kind) const {
        return state / strides_[kind] % (kinds_.counts[kind] + 1);
    }
    Limited limited(Int limit) const;
    bool forward(Limited& at) const;
    bool backward(Limited& at) const;

  private:
    std::size_t place(std::size_t level, std::size_t kind) const {
        return (row_[level] * size() + kind) * (kinds_.done.size() + 2);
    }
    void add_memory();
    void reach(Limited& at) const;

    Kinds kinds_;
    std::int32_t states_ = 1;
    std::vector<std::int32_t> strides_;
    std::vector<std::vector<Int>> exit_, entry_;    // by kind, as in Reach of cut.cpp
    std::vector<std::size_t> row_;                  // of a level, in the tables of `far` and `near`
    std::vector<std::int32_t> mem_far_, mem_near_;  // what memory alone allows; empty where it does not matter
};

}  // namespace pipekern::plan
