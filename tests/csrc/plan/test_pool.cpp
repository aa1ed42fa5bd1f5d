#include "check.h"
#include "plan/pool.h"

using namespace pipekern::plan;

namespace {

// Layers of 9, 2 and 9 on two fast devices and a slow one.
Kinds golden() {
    Kinds kinds;
    kinds.parts = 3;
    kinds.counts = {2, 1};
    kinds.done = {0, 9, 11, 20};
    kinds.cuts = {0, 0, 0, 0};
    kinds.factors = {1, 3};
    return kinds;
}

void reach() {
    const Pool pool(golden());
    const auto no = pool.reaches(8), yes = pool.reaches(9);
    CHECK(!no.may && no.edge == 9);
    CHECK(yes.may && yes.edge <= 9);
}

void the_slow_one_is_in_the_middle() {
    const Pool pool(golden());
    const auto found = pool.cheapest(9, 1000, 100);
    CHECK(found.cut && found.cut->total == 24 && found.least == 24);
    CHECK((found.cut->bounds == std::vector<std::int32_t>{0, 1, 2, 3}));
    CHECK((found.cut->devices == std::vector<std::int32_t>{0, 1, 0}));
    CHECK(pool.least_total(9, 1000) <= 24 && pool.least_total(8, 1000) == 1000);
    CHECK(!pool.cheapest(9, 24, 100).cut && pool.cheapest(9, 24, 100).least == 24);
}

void memory() {
    Kinds kinds = golden();
    kinds.held = {{0, 5, 6, 9}, {0, 5, 6, 9}, {0, 5, 6, 9}};
    kinds.caps = {5, 0};
    CHECK(!Pool(kinds).reaches(100).may);
    kinds.caps = {5, 1};
    CHECK(Pool(kinds).cheapest(100, 1000, 100).cut->total == 24);
}

void beyond_64_bits() {
    Kinds kinds = golden();
    const Int huge = Int{1} << 100;
    for (Int& value : kinds.done) value *= huge;
    const auto found = Pool(kinds).cheapest(9 * huge, 1000 * huge, 100);
    CHECK(found.cut && found.cut->total == 24 * huge && found.least == 24 * huge);
}

}  // namespace

int main() {
    reach();
    the_slow_one_is_in_the_middle();
    memory();
    beyond_64_bits();
}
