#include "transport/digest.h"

#include <cstring>

namespace pipekern {
namespace {

using u64 = std::uint64_t;

// Odd constants: the fractional parts of the square roots of 2, 3, 5, 7 and 11.
constexpr u64 kMix[5] = {0x6a09e667f3bcc909, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                         0x510e527fade682d1};

inline u64 load(const unsigned char* p) {
    u64 word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

// The two halves of the 128-bit product, folded: one multiplication mixes 16 bytes.
inline u64 fold(u64 a, u64 b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<u64>(product) ^ static_cast<u64>(product >> 64);
}

}  // namespace

u64 digest(const void* data, std::size_t bytes, u64 seed) {
    const auto* p = static_cast<const unsigned char*>(data);
    u64 lane[4] = {seed ^ kMix[0], seed ^ kMix[1], seed ^ kMix[2], seed ^ kMix[3]};
    std::size_t left = bytes;

    // 1. Four lanes, 64 bytes a turn: the products do not wait for each other.
    for (; left >= 64; left -= 64, p += 64)
        for (int i = 0; i < 4; ++i) lane[i] = fold(load(p + 16 * i) ^ kMix[i], load(p + 16 * i + 8) ^ lane[i]);

    // 2. The rest, padded with zeros; the length tells padding from data.
    unsigned char tail[64] = {};
    if (left) {
        std::memcpy(tail, p, left);
        for (int i = 0; i < 4; ++i) lane[i] = fold(load(tail + 16 * i) ^ kMix[i], load(tail + 16 * i + 8) ^ lane[i]);
    }

    // 3. The lanes and the length into one word.
    u64 out = static_cast<u64>(bytes) ^ kMix[4];
    for (u64 word : lane) out = fold(out ^ word, kMix[4] ^ (word >> 29)) + word;
    return fold(out, kMix[4]);
}

}  // namespace pipekern
