// The kernels of a link: put casts a tensor into a slot, take undoes it, add does so into a sum. Each reads its input
// once and writes its output once, 16 bytes at a time; grid: one thread for 8 values, or 16 in e4m3.
//
//   pk_put_f32_bf16    reads 4 bytes a value, writes 2          pk_take_bf16_f32   reads 2, writes 4; add reads 4 more
//   pk_put_*_e4m3      reads 4 or 2, writes 1 + 4/128           pk_take_e4m3_*     reads 1 + 4/128, writes 4 or 2
//   pk_add_*           reads the slot and the sum, writes the sum
//
// A slot in e4m3 holds the codes, and from the next multiple of 256 bytes the scales, fp32. Slots are 256-byte aligned;
// tensors need not be. Flags are written by the stream after the kernel, with a system-wide fence, not by the kernel.
#include "cast.h"

namespace pipekern::cuda::cast {

constexpr u32 kThreads = 256;
constexpr u32 kWide = 16;  // values of a thread in e4m3; 8 threads have a group

PIPEKERN_BODY u64 first_of_thread(u32 values) {
    return (static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x) * values;
}

PIPEKERN_BODY bool aligned(const void* pointer) { return (reinterpret_cast<u64>(pointer) & 15) == 0; }

template <class T, u32 kValues>
PIPEKERN_BODY void load(const void* memory, u64 first, u64 count, float (&values)[kValues]) {
    constexpr u32 kWords = kValues * sizeof(typename T::Bits) / 4, kPerWord = kValues / kWords;
    const auto* tensor = static_cast<const typename T::Bits*>(memory) + first;
    if (first + kValues <= count && aligned(tensor)) {
        u32 words[kWords];
#pragma unroll
        for (u32 i = 0; i < kWords / 4; ++i) {
            const uint4 four = reinterpret_cast<const uint4*>(tensor)[i];
            words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
        }
#pragma unroll
        for (u32 i = 0; i < kValues; ++i)
            values[i] = T::up(static_cast<typename T::Bits>(words[i / kPerWord] >> 32 / kPerWord * (i % kPerWord)));
        return;
    }
#pragma unroll
    for (u32 i = 0; i < kValues; ++i) values[i] = first + i < count ? T::up(tensor[i]) : 0.0f;
}

template <class T, u32 kValues>
PIPEKERN_BODY void store(void* memory, u64 first, u64 count, const float (&values)[kValues]) {
    constexpr u32 kWords = kValues * sizeof(typename T::Bits) / 4, kPerWord = kValues / kWords;
    auto* tensor = static_cast<typename T::Bits*>(memory) + first;
    if (first + kValues <= count && aligned(tensor)) {
        u32 words[kWords] = {};
#pragma unroll
        for (u32 i = 0; i < kValues; ++i)
            words[i / kPerWord] |= static_cast<u32>(T::down(values[i])) << 32 / kPerWord * (i % kPerWord);
#pragma unroll
        for (u32 i = 0; i < kWords / 4; ++i)
            reinterpret_cast<uint4*>(tensor)[i] =
                make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
        return;
    }
#pragma unroll
    for (u32 i = 0; i < kValues; ++i)
        if (first + i < count) tensor[i] = T::down(values[i]);
}

// The codes of two values, the first in the low byte.
PIPEKERN_BODY u32 e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return e4m3_of(low) | static_cast<u32>(e4m3_of(high)) << 8;
#endif
}

PIPEKERN_BODY void put_bf16(const void* tensor, void* slot, u64 count) {
    float values[8];
    const u64 first = first_of_thread(8);
    load<F32>(tensor, first, count, values);
    store<Bf16>(slot, first, count, values);
}

template <class T>
PIPEKERN_BODY void put_e4m3(const void* tensor, void* slot, u64 count) {
    float values[kWide];
    const u64 first = first_of_thread(kWide);
    load<T>(tensor, first, count, values);

    u32 largest = 0;
#pragma unroll
    for (u32 i = 0; i < kWide; ++i) largest = max(largest, bits_of(values[i]) & 0x7fffffff);
#pragma unroll
    for (u32 step = 1; step < kGroupValues / kWide; step *= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffff, largest, step));
    if (first >= count) return;
    const float scale = scale_of(largest), inverse = inverse_of(scale);

    u32 words[4] = {};
#pragma unroll
    for (u32 i = 0; i < kWide; i += 2)
        words[i / 4] |= e4m3_pair(values[i] * inverse, values[i + 1] * inverse) << 8 * (i % 4);
    u8* codes = static_cast<u8*>(slot) + first;
    if (first + kWide <= count) {
        *reinterpret_cast<uint4*>(codes) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
        for (u32 i = 0; i < kWide; ++i)
            if (first + i < count) codes[i] = static_cast<u8>(words[i / 4] >> 8 * (i % 4));
    }
    if (first % kGroupValues == 0)
        reinterpret_cast<float*>(static_cast<u8*>(slot) + scales_after(count))[first / kGroupValues] = scale;
}

template <class T, class S, bool kAdd>
PIPEKERN_BODY void take_plain(void* tensor, const void* slot, u64 count) {
    float values[8], sum[8];
    const u64 first = first_of_thread(8);
    load<S>(slot, first, count, values);
    if (kAdd) {
        load<T>(tensor, first, count, sum);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) values[i] += sum[i];
    }
    store<T>(tensor, first, count, values);
}

template <class T, bool kAdd>
PIPEKERN_BODY void take_e4m3(void* tensor, const void* slot, u64 count) {
    const u64 first = first_of_thread(kWide);
    if (first >= count) return;
    // Behind the codes lie, up to the scales, bytes of the slot: the last thread may read them.
    const uint4 four = *reinterpret_cast<const uint4*>(static_cast<const u8*>(slot) + first);
    const u32 words[4] = {four.x, four.y, four.z, four.w};
    const float scale =
        reinterpret_cast<const float*>(static_cast<const u8*>(slot) + scales_after(count))[first / kGroupValues];
    float values[kWide], sum[kWide];
#pragma unroll
    for (u32 i = 0; i < kWide; ++i) values[i] = float_of_e4m3(static_cast<u8>(words[i / 4] >> 8 * (i % 4))) * scale;
    if (kAdd) {
        load<T>(tensor, first, count, sum);
#pragma unroll
        for (u32 i = 0; i < kWide; ++i) values[i] += sum[i];
    }
    store<T>(tensor, first, count, values);
}

}  // namespace pipekern::cuda::cast

// One signature for all: the tensor, its part of the slot, and the number of values.
#define PIPEKERN_PUT(name, body)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) name(const void* tensor, void* slot, unsigned long long n) { \
        using namespace pipekern::cuda::cast;                                                                      \
        body(tensor, slot, n);                                                                                     \
    }
#define PIPEKERN_TAKE(name, ...)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) name(void* tensor, const void* slot, unsigned long long n) { \
        using namespace pipekern::cuda::cast;                                                                      \
        __VA_ARGS__(tensor, slot, n);                                                                              \
    }

PIPEKERN_PUT(pk_put_f32_bf16, put_bf16)
PIPEKERN_PUT(pk_put_f32_e4m3, put_e4m3<F32>)
PIPEKERN_PUT(pk_put_bf16_e4m3, put_e4m3<Bf16>)
PIPEKERN_PUT(pk_put_f16_e4m3, put_e4m3<F16>)

PIPEKERN_TAKE(pk_take_bf16_f32, take_plain<F32, Bf16, false>)
PIPEKERN_TAKE(pk_take_e4m3_f32, take_e4m3<F32, false>)
PIPEKERN_TAKE(pk_take_e4m3_bf16, take_e4m3<Bf16, false>)
PIPEKERN_TAKE(pk_take_e4m3_f16, take_e4m3<F16, false>)

PIPEKERN_TAKE(pk_add_bf16_f32, take_plain<F32, Bf16, true>)
PIPEKERN_TAKE(pk_add_e4m3_f32, take_e4m3<F32, true>)
PIPEKERN_TAKE(pk_add_e4m3_bf16, take_e4m3<Bf16, true>)
PIPEKERN_TAKE(pk_add_e4m3_f16, take_e4m3<F16, true>)
PIPEKERN_TAKE(pk_add_f32, take_plain<F32, F32, true>)
PIPEKERN_TAKE(pk_add_bf16, take_plain<Bf16, Bf16, true>)
PIPEKERN_TAKE(pk_add_f16, take_plain<F16, F16, true>)
