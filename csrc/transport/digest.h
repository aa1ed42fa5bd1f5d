// A 64-bit digest at memory speed, to tell whether two ranks hold the same batch. Not cryptographic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pipekern {

// Depends on every byte, their order, the length and the seed.
std::uint64_t digest(const void* data, std::size_t bytes, std::uint64_t seed);

}  // namespace pipekern
