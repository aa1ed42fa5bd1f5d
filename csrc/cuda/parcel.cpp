#include "cuda/parcel.h"

#include "transport/header.h"

namespace pipekern::cuda {
namespace {

constexpr std::size_t kPartAlign = 256;

Cast cast_of(std::uint8_t dtype, std::uint64_t elements, Codec codec) {
    const auto [code, bits] = kDtypes[dtype];
    if (codec == Codec::kNone || elements < kGroup) return Cast::kCopy;
    if (code == kFloat && bits == 32) return codec == Codec::kBf16 ? Cast::kF32Bf16 : Cast::kF32E4m3;
    if (codec == Codec::kFp8 && code == kBfloat) return Cast::kBf16E4m3;
    if (codec == Codec::kFp8 && code == kFloat && bits == 16) return Cast::kF16E4m3;
    return Cast::kCopy;
}

std::uint64_t cast_bytes(Cast cast, std::uint64_t elements, std::uint64_t bytes) {
    if (cast == Cast::kCopy) return bytes;
    if (cast == Cast::kF32Bf16) return 2 * elements;
    return scales_offset(elements) + 4 * ((elements + kGroup - 1) / kGroup);
}

}  // namespace

std::uint64_t scales_offset(std::uint64_t elements) { return align_up(elements, kPartAlign); }

Parcel lay_out(const std::vector<DeviceTensor>& tensors, Codec codec) {
    Parcel parcel;
    for (const DeviceTensor& tensor : tensors) {
        const std::uint64_t bytes = tensor.elements * kDtypes[tensor.dtype].bits / 8;
        const Cast cast = cast_of(tensor.dtype, tensor.elements, codec);
        parcel.bytes = align_up(parcel.bytes, kPartAlign);
        parcel.landing_bytes = align_up(parcel.landing_bytes, kPartAlign);
        parcel.parts.push_back({tensor.dtype, cast, tensor.elements, bytes, parcel.bytes, parcel.landing_bytes});
        parcel.bytes += cast_bytes(cast, tensor.elements, bytes);
        parcel.landing_bytes += bytes;
        parcel.casts = parcel.casts || cast != Cast::kCopy;
    }
    return parcel;
}

}  // namespace pipekern::cuda
