// The clock of every deadline: monotonic, the same on all processes of a host.
#pragma once

#include <time.h>

#include <cstdint>

namespace pipekern {

constexpr std::int64_t kMicrosecond = 1'000;
constexpr std::int64_t kMillisecond = 1'000'000;
constexpr std::int64_t kSecond = 1'000'000'000;

// Nanoseconds since some fixed moment.
inline std::int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * kSecond + time.tv_nsec;
}

}  // namespace pipekern
