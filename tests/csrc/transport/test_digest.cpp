// The digest tells apart what differs in a bit, a place, a length or the seed, and does not depend on alignment.
#include <algorithm>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "transport/digest.h"

using pipekern::digest;

int main() {
    // The same on every machine and in every version: it is part of the message format.
    const char golden[] = "F0 F1 B0 B1";
    CHECK_EQUAL(digest(golden, sizeof golden - 1, 7), 9301727771821799887ull);
    CHECK_EQUAL(digest(nullptr, 0, 0), 14239972668132374379ull);

    std::mt19937_64 random(std::random_device{}());
    std::vector<unsigned char> data(300);
    for (auto& byte : data) byte = static_cast<unsigned char>(random());

    std::set<std::uint64_t> seen;
    std::size_t count = 0;
    for (std::size_t length = 0; length <= data.size(); ++length, ++count) seen.insert(digest(data.data(), length, 0));
    for (std::uint64_t seed = 1; seed < 100; ++seed, ++count) seen.insert(digest(data.data(), data.size(), seed));
    for (std::size_t bit = 0; bit < 8 * data.size(); ++bit, ++count) {
        auto changed = data;
        changed[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
        seen.insert(digest(changed.data(), changed.size(), 0));
    }
    for (std::size_t i = 16; i + 16 <= data.size(); i += 16, ++count) {  // two blocks exchanged
        auto changed = data;
        std::swap_ranges(changed.begin(), changed.begin() + 16, changed.begin() + static_cast<std::ptrdiff_t>(i));
        seen.insert(digest(changed.data(), changed.size(), 0));
    }
    CHECK_EQUAL(seen.size(), count);

    std::vector<unsigned char> zeros(512, 0);
    std::set<std::uint64_t> of_zeros;
    for (std::size_t length = 0; length <= zeros.size(); ++length) of_zeros.insert(digest(zeros.data(), length, 0));
    CHECK_EQUAL(of_zeros.size(), zeros.size() + 1);

    for (std::size_t shift = 1; shift < 16; ++shift) {
        std::vector<unsigned char> moved(data.size() + shift);
        std::memcpy(moved.data() + shift, data.data(), data.size());
        CHECK_EQUAL(digest(moved.data() + shift, data.size(), 3), digest(data.data(), data.size(), 3));
    }
}
