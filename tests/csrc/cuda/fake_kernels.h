// The link's kernels on the host, from the same casts.
#pragma once

#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "cuda/kernels/cast.h"

namespace fake {

using namespace pipekern::cuda::cast;
using Kernel = void (*)(void* tensor, void* slot, u64 count);

template <class T>
T read(const void* memory, u64 place) {
    T value;
    std::memcpy(&value, static_cast<const char*>(memory) + place * sizeof(T), sizeof value);
    return value;
}
template <class T>
void write(void* memory, u64 place, T value) {
    std::memcpy(static_cast<char*>(memory) + place * sizeof(T), &value, sizeof value);
}
inline void* scales_of(void* slot, u64 count) { return static_cast<char*>(slot) + scales_after(count); }

template <class From, class To, bool kAdd>
void convert(void* target, const void* source, u64 count) {
    for (u64 i = 0; i < count; ++i) {
        float value = From::up(read<typename From::Bits>(source, i));
        if (kAdd) value += To::up(read<typename To::Bits>(target, i));
        write(target, i, To::down(value));
    }
}

inline void put_bf16(void* tensor, void* slot, u64 count) { convert<F32, Bf16, false>(slot, tensor, count); }

template <class T>
void put_e4m3(void* tensor, void* slot, u64 count) {
    for (u64 first = 0; first < count; first += kGroupValues) {
        const u64 end = first + kGroupValues < count ? first + kGroupValues : count;
        u32 largest = 0;
        for (u64 i = first; i < end; ++i) {
            const u32 bits = bits_of(T::up(read<typename T::Bits>(tensor, i))) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        const float scale = scale_of(largest), inverse = inverse_of(scale);
        for (u64 i = first; i < end; ++i)
            write<u8>(slot, i, e4m3_of(T::up(read<typename T::Bits>(tensor, i)) * inverse));
        write(scales_of(slot, count), first / kGroupValues, scale);
    }
}

template <class T, bool kAdd>
void take_e4m3(void* tensor, void* slot, u64 count) {
    for (u64 i = 0; i < count; ++i) {
        float value = float_of_e4m3(read<u8>(slot, i)) * read<float>(scales_of(slot, count), i / kGroupValues);
        if (kAdd) value += T::up(read<typename T::Bits>(tensor, i));
        write(tensor, i, T::down(value));
    }
}

template <class From, class To, bool kAdd>
void take(void* tensor, void* slot, u64 count) {
    convert<From, To, kAdd>(tensor, slot, count);
}

// Nothing for a name that no kernel has.
inline Kernel find_kernel(const std::string& name) {
    static const std::map<std::string, Kernel> all = {
        {"pk_put_f32_bf16", put_bf16},
        {"pk_put_f32_e4m3", put_e4m3<F32>},
        {"pk_put_bf16_e4m3", put_e4m3<Bf16>},
        {"pk_put_f16_e4m3", put_e4m3<F16>},
        {"pk_take_bf16_f32", take<Bf16, F32, false>},
        {"pk_take_e4m3_f32", take_e4m3<F32, false>},
        {"pk_take_e4m3_bf16", take_e4m3<Bf16, false>},
        {"pk_take_e4m3_f16", take_e4m3<F16, false>},
        {"pk_add_bf16_f32", take<Bf16, F32, true>},
        {"pk_add_e4m3_f32", take_e4m3<F32, true>},
        {"pk_add_e4m3_bf16", take_e4m3<Bf16, true>},
        {"pk_add_e4m3_f16", take_e4m3<F16, true>},
        {"pk_add_f32", take<F32, F32, true>},
        {"pk_add_bf16", take<Bf16, Bf16, true>},
        {"pk_add_f16", take<F16, F16, true>},
    };
    const auto found = all.find(name);
    return found == all.end() ? nullptr : found->second;
}

}  // namespace fake
