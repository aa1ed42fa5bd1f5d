// The casts of a link, value by value. One text for nvcc, NVRTC and the host's compiler: on the host they are tested
// against torch, bit for bit.
#pragma once

#if defined(__CUDACC__)
#define PIPEKERN_BODY __device__ __forceinline__
#else
#define PIPEKERN_BODY inline
#endif

namespace pipekern::cuda::cast {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 kGroupValues = 128;  // that share a scale
constexpr u32 kInfinity = 0x7f800000, kNan = 0x7fc00000;

PIPEKERN_BODY u32 bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    u32 bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
#endif
}

PIPEKERN_BODY float float_of(u32 bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
#endif
}

// How tensors hold their values: `up` is exact, `down` rounds to nearest, ties to even.
struct F32 {
    using Bits = u32;
    static PIPEKERN_BODY float up(u32 bits) { return float_of(bits); }
    static PIPEKERN_BODY u32 down(float value) { return bits_of(value); }
};

struct Bf16 {
    using Bits = u16;
    static PIPEKERN_BODY float up(u16 bits) { return float_of(static_cast<u32>(bits) << 16); }
    static PIPEKERN_BODY u16 down(float value) {
        const u32 bits = bits_of(value);
        const u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        return static_cast<u16>((bits & 0x7fffffff) > kInfinity ? 0x7fc0 : rounded);
    }
};

struct F16 {
    using Bits = u16;
    static PIPEKERN_BODY float up(u16 bits) {
        const u32 sign = static_cast<u32>(bits & 0x8000) << 16, rest = static_cast<u32>(bits & 0x7fff) << 13;
        const u32 finite = bits_of(float_of(rest) * float_of(0x77800000));  // 2^112: exact, subnormals too
        return float_of(sign | (rest >= 0x0f800000 ? rest | kInfinity : finite));
    }
    static PIPEKERN_BODY u16 down(float value) {
        const u32 bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
        const u32 normal = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
        const u32 subnormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000;  // 0.5 has a last place of 2^-24
        const u32 finite = rest < 0x38800000 ? subnormal : normal < 0x7c00 ? normal : 0x7c00;
        return static_cast<u16>(sign | (rest > kInfinity ? 0x7e00 : finite));
    }
};

// e4m3 without infinities: to nearest, ties to even; beyond 448 saturates; NaN stays NaN.
PIPEKERN_BODY u8 e4m3_of(float value) {
    const u32 bits = bits_of(value), sign = bits >> 24 & 0x80, rest = bits & 0x7fffffff;
    const u32 normal = (rest + 0x7ffff + (rest >> 20 & 1) - 0x3c000000) >> 20;
    const u32 subnormal = bits_of(float_of(rest) + 16384.0f) - 0x46800000;  // 16384 has a last place of 2^-9
    const u32 finite = rest < 0x3c800000 ? subnormal : rest < 0x43e00000 ? normal : 0x7e;
    return static_cast<u8>(sign | (rest > kInfinity ? 0x7f : finite));
}

PIPEKERN_BODY float float_of_e4m3(u8 code) {
    const u32 sign = static_cast<u32>(code & 0x80) << 24, rest = static_cast<u32>(code & 0x7f) << 20;
    const u32 finite = bits_of(float_of(rest) * float_of(0x7b800000));  // 2^120: exact, subnormals too
    return float_of(sign | ((code & 0x7f) == 0x7f ? kNan : finite));
}

// A group's scale, from the largest of its values' bits without sign: the least power of two, at least 2^-126, with
// which none exceeds 448. Powers of two lose nothing of a value, and dividing by one is a product. A group with a NaN
// or an infinity becomes NaN as a whole: none is hidden.
PIPEKERN_BODY float scale_of(u32 largest) {
    if (largest >= kInfinity) return float_of(kNan);
    const u32 exponent = (largest >> 23) + ((largest & 0x7fffff) > 0x600000 ? 1 : 0);
    return float_of((exponent > 9 ? exponent - 8 : 1) << 23);
}

PIPEKERN_BODY float inverse_of(float scale) {
    return bits_of(scale) >= kInfinity ? float_of(kNan) : float_of((254u << 23) - bits_of(scale));
}

// Where the scales begin behind this many codes.
PIPEKERN_BODY u64 scales_after(u64 values) { return (values + 255) / 256 * 256; }

}  // namespace pipekern::cuda::cast
