// The 64 bytes before every message. Its sequence number is the slot's data flag.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pipekern {

constexpr std::uint32_t kMagic = 0x6b706970;  // "pipk"
constexpr std::uint8_t kVersion = 1;
constexpr std::size_t kMaxDims = 4;
constexpr std::size_t kAlign = 64;  // of every tensor in a slot

constexpr std::uint8_t kRequiresGrad = 1;
constexpr std::uint8_t kBundle = 2;  // a descriptor, then the tensors that it names
constexpr std::uint8_t kDevice = 4;  // tensors travel beside the payload, through device memory: see csrc/cuda

struct Header {
    std::uint32_t magic;
    std::uint8_t version;
    std::uint8_t dtype;  // place in kDtypes
    std::uint8_t ndim;
    std::uint8_t flags;
    std::atomic<std::uint64_t> seq;  // written last: the message is whole once a reader sees its number here
    std::uint64_t tag;
    std::uint64_t bytes;  // of the payload
    std::uint64_t digest;
    std::uint32_t shape[kMaxDims];
    std::uint32_t generation;  // of the memory that holds the payload
    std::uint32_t descriptor;  // its bytes, in a bundle
};
static_assert(sizeof(Header) == 64 && std::atomic<std::uint64_t>::is_always_lock_free);

// DLPack's type code and bits, in the order of message.py's DTYPES.
struct Dtype {
    std::uint8_t code;
    std::uint8_t bits;
};
constexpr std::uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6;
constexpr std::uint8_t kE4m3fn = 10, kE4m3fnuz = 11, kE5m2 = 12, kE5m2fnuz = 13, kE8m0fnu = 14;
constexpr Dtype kDtypes[] = {
    {kUInt, 8},      {kInt, 8},    {kInt, 16},    {kInt, 32},   {kInt, 64},     {kUInt, 16},    {kUInt, 32},
    {kUInt, 64},     {kFloat, 16}, {kBfloat, 16}, {kFloat, 32}, {kFloat, 64},   {kComplex, 32}, {kComplex, 64},
    {kComplex, 128}, {kBool, 8},   {kE4m3fn, 8},  {kE5m2, 8},   {kE4m3fnuz, 8}, {kE5m2fnuz, 8}, {kE8m0fnu, 8},
};
constexpr std::size_t kDtypeCount = sizeof kDtypes / sizeof *kDtypes;

constexpr std::size_t align_up(std::size_t bytes, std::size_t step = kAlign) {
    return (bytes + step - 1) / step * step;
}

}  // namespace pipekern
