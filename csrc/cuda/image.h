// What the build embeds: the kernels compiled by nvcc, if it was there, and their source for NVRTC. CMakeLists.txt
// writes the definitions.
#pragma once

#include <cstddef>

namespace pipekern::cuda {

extern const unsigned char kImage[];    // a fatbin for sm_80 and sm_90, and PTX
extern const std::size_t kImageBytes;   // 0 without nvcc
extern const char* const kCastSource;   // kernels/cast.h
extern const char* const kCodecSource;  // kernels/codec.cu

}  // namespace pipekern::cuda
