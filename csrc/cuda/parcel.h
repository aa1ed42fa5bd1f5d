// The tensors of a message as they lie in a slot, and how each is cast on the way.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/driver.h"

namespace pipekern::cuda {

// What a link does to floating-point tensors of at least a group of values.
enum class Codec : std::uint8_t {
    kNone = 0,
    kBf16 = 1,  // fp32 travels as bf16
    kFp8 = 2,   // fp32, bf16 and fp16 travel as e4m3 with a scale each group
};

enum class Cast : std::uint8_t { kCopy = 0, kF32Bf16 = 1, kF32E4m3 = 2, kBf16E4m3 = 3, kF16E4m3 = 4 };

constexpr std::uint64_t kGroup = 128;  // values that share a scale

struct DeviceTensor {
    Pointer data;
    std::uint64_t elements;
    std::uint8_t dtype;  // place in kDtypes
};

struct Part {
    std::uint8_t dtype;
    Cast cast;
    std::uint64_t elements;
    std::uint64_t bytes;    // of the tensor
    std::uint64_t offset;   // in the slot
    std::uint64_t landing;  // offset of the tensor after the cast is undone
};

struct Parcel {
    std::vector<Part> parts;
    std::uint64_t bytes = 0;          // in the slot
    std::uint64_t landing_bytes = 0;  // after the casts are undone
    bool casts = false;               // whether any part is cast
};

// Where the scales of a part in e4m3 begin, from its own offset.
std::uint64_t scales_offset(std::uint64_t elements);

// The same on both ends: it follows from the tensors and the link's codec alone.
Parcel lay_out(const std::vector<DeviceTensor>& tensors, Codec codec);

}  // namespace pipekern::cuda
