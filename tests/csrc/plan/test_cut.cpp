#include "check.h"
#include "plan/cut.h"

using namespace pipekern::plan;

namespace {

// Layers of 1, 2 and 3 on two devices, cuts of 5 and 0 between them.
Lattice golden() {
    Lattice lattice;
    lattice.levels = {{Node{{}, {{1, 2}}}}, {Node{{{0, 0}}, {{1, 1}}}}, {Node{{{0, 1}}, {}}}};
    lattice.done = {0, 1, 3, 6};
    lattice.cuts = {0, 5, 0, 0};
    lattice.factors = {1, 1};
    lattice.least_cuts = {0, 0, 0};
    return lattice;
}

const Windows kWindows = {{{0, 0}}, {{1, 2}}, {{3, 3}}};

void limit_and_budget() {
    const auto cut = cheapest(golden(), kWindows, 100, 100);
    CHECK(cut && cut->total == 6);
    CHECK((cut->bounds == std::vector<std::int32_t>{0, 2, 3} && cut->devices == std::vector<std::int32_t>{0, 1}));
    CHECK(!cheapest(golden(), kWindows, 2, 100));
    CHECK(!cheapest(golden(), kWindows, 100, 6) && cheapest(golden(), kWindows, 100, 7));
}

void memory() {
    Lattice lattice = golden();
    lattice.held = {{0, 4, 8, 12}, {0, 4, 8, 12}};
    lattice.caps = {4, 8};
    const auto cut = cheapest(lattice, kWindows, 100, 100);
    CHECK(cut && cut->bounds[1] == 1 && cut->total == 16);
    lattice.caps = {3, 8};
    CHECK(!cheapest(lattice, kWindows, 100, 100));
}

void beyond_64_bits() {
    Lattice lattice = golden();
    const Int huge = Int{1} << 100;
    for (auto* values : {&lattice.done, &lattice.cuts})
        for (Int& value : *values) value *= huge;
    const auto cut = cheapest(lattice, kWindows, 100 * huge, 100 * huge);
    CHECK(cut && cut->total == 6 * huge && cut->bounds[1] == 2);
}

}  // namespace

int main() {
    limit_and_budget();
    memory();
    beyond_64_bits();
}
