#include "plan/pool.h"

#include <algorithm>
#include <map>

namespace pipekern::plan {

using I32 = std::int32_t;

Pool::Pool(Kinds kinds) : kinds_(std::move(kinds)), row_(static_cast<std::size_t>(kinds_.parts) + 1, 0) {
    const auto layers = kinds_.done.size();
    for (std::size_t kind = 0; kind < size(); ++kind) {
        strides_.push_back(states_);
        states_ *= kinds_.counts[kind] + 1;
        std::vector<Int> exit(layers), entry(layers);
        for (std::size_t a = 0; a < layers; ++a) {
            const Int own = kinds_.done[a] * kinds_.factors[kind] - kinds_.cuts[a];
            exit[a] = a ? std::max(exit[a - 1], own) : own;
        }
        for (std::size_t b = layers; b-- > 0;) {
            const Int own = kinds_.done[b] * kinds_.factors[kind] + kinds_.cuts[b];
            entry[b] = b + 1 < layers ? std::min(entry[b + 1], own) : own;
        }
        exit_.push_back(std::move(exit));
        entry_.push_back(std::move(entry));
    }
    if (!kinds_.held.empty()) add_memory();
}

// Positions that hold the same share their rows.
void Pool::add_memory() {
    std::map<std::vector<Int>, std::size_t> rows;
    for (std::size_t level = 1; level < row_.size(); ++level) {
        const auto& held = kinds_.held[level - 1];
        const auto [found, fresh] = rows.emplace(held, rows.size());
        row_[level] = found->second;
        if (!fresh) continue;
        for (std::size_t kind = 0; kind < size(); ++kind) {
            const Int cap = kinds_.caps[kind];
            I32 b = 0, a = 0;
            mem_far_.push_back(-1);
            mem_near_.push_back(0);
            for (I32 start = 0; start <= layers(); ++start) {
                while (b < layers() &&
                       held[static_cast<std::size_t>(b) + 1] - held[static_cast<std::size_t>(start)] <= cap)
                    ++b;
                mem_far_.push_back(b);
            }
            for (I32 end = 0; end <= layers(); ++end) {
                while (held[static_cast<std::size_t>(end)] - held[static_cast<std::size_t>(a)] > cap) ++a;
                mem_near_.push_back(a);
            }
            mem_far_.push_back(layers());
            mem_near_.push_back(layers() + 1);
        }
    }
    row_[0] = row_[1];
}

Limited Pool::limited(Int limit) const {
    Limited at;
    at.limit = limit;
    for (std::size_t kind = 0; kind < size(); ++kind) {
        const auto &exit = exit_[kind], &entry = entry_[kind];
        std::size_t b = 0, a = 0;
        at.far.push_back(-1);
        at.near.push_back(0);
        for (const Int from : exit) {
            while (b + 1 < entry.size() && entry[b + 1] <= limit + from) ++b;
            at.far.push_back(static_cast<I32>(b));
        }
        for (const Int to : entry) {
            while (a < exit.size() && exit[a] < to - limit) ++a;
            at.near.push_back(static_cast<I32>(a));
        }
        at.far.push_back(layers());
        at.near.push_back(layers() + 1);
    }
    if (by_level()) {
        const auto once = at.far.size();
        const auto with = [&](const std::vector<I32>& memory, std::vector<I32>& time, const auto& pick) {
            std::vector<I32> both(memory);
            for (std::size_t i = 0; i < both.size(); ++i) both[i] = pick(both[i], time[i % once]);
            time = std::move(both);
        };
        with(mem_far_, at.far, [](I32 x, I32 y) { return std::min(x, y); });
        with(mem_near_, at.near, [](I32 x, I32 y) { return std::max(x, y); });
    }
    return at;
}

Reached Pool::reaches(Int limit) const {
    Limited at = limited(limit);
    const bool may = forward(at);
    Int edge = may ? 0 : kEndless;
    for (std::size_t kind = 0; kind < size(); ++kind) {
        const auto &exit = exit_[kind], &entry = entry_[kind];
        std::size_t b = 0;
        for (const Int from : exit) {
            while (b + 1 < entry.size() && entry[b + 1] <= limit + from) ++b;
            if (may && entry[b] - from <= limit)
                edge = std::max(edge, entry[b] - from);
            else if (!may && b + 1 < entry.size())
                edge = std::min(edge, entry[b + 1] - from);
        }
    }
    return {may, edge};
}

// Bounds on the last end of every state, from the first on.
bool Pool::forward(Limited& at) const {
    const I32 parts = kinds_.parts, run = kinds_.counts[0] + 1;
    at.high.assign(static_cast<std::size_t>(states_), -1);
    std::vector<std::pair<I32, std::size_t>>
        others;  // stride and kind of what may have come last, the first kind apart
    bool may = false;
    for (I32 base = 0; base < states_; base += run) {
        I32 level = 0;
        others.clear();
        for (std::size_t kind = 1; kind < size(); ++kind)
            if (const I32 count = used(base, kind)) level += count, others.emplace_back(strides_[kind], kind);
        for (I32 state = base; state < base + run && level <= parts; ++state, ++level) {
            auto* high = at.high.data() + state;
            const auto steps = static_cast<std::size_t>(level);
            I32 end = state > base ? far(at, steps, 0)[high[-1]] : state ? -1 : 0;
            for (const auto& [stride, kind] : others) end = std::max(end, far(at, steps, kind)[high[-stride]]);
            end = std::min(end, layers() - (parts - level));
            *high = end < level ? -1 : end;
            may = may || (level == parts && *high == layers());
        }
    }
    return may;
}

// Bounds on the first end of every state, from the last on, and those of `forward` undone where no end is left.
bool Pool::backward(Limited& at) const {
    const I32 parts = kinds_.parts, run = kinds_.counts[0] + 1, none = layers() + 1;
    at.low.assign(static_cast<std::size_t>(states_), none);
    std::vector<std::pair<I32, std::size_t>> others;
    for (I32 base = states_ - run; base >= 0; base -= run) {
        I32 level = run - 1;
        others.clear();
        for (std::size_t kind = 1; kind < size(); ++kind) {
            const I32 count = used(base, kind);
            level += count;
            if (count < kinds_.counts[kind]) others.emplace_back(strides_[kind], kind);
        }
        for (I32 state = base + run - 1; state >= base; --state, --level) {
            if (level > parts) continue;
            I32 start = level == parts ? layers() : none;
            if (level < parts) {
                const auto steps = static_cast<std::size_t>(level) + 1;
                if (state < base + run - 1) start = near(at, steps, 0)[at.low[static_cast<std::size_t>(state) + 1]];
                for (const auto& [stride, kind] : others)
                    start = std::min(start, near(at, steps, kind)[at.low[static_cast<std::size_t>(state + stride)]]);
            }
            start = std::max(start, level);
            if (start <= at.high[static_cast<std::size_t>(state)]) at.low[static_cast<std::size_t>(state)] = start;
        }
    }
    return at.low[0] == 0;
}

}  // namespace pipekern::plan
