// What the kernel tells of another process of this host.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace pipekern {

struct Pulse {
    std::uint64_t cpu_ticks = 0;  // of all its threads, in user and in kernel mode
    bool debugged = false;        // a debugger has stopped it
};

// From /proc; all zero for a process that has gone or may not be looked at.
Pulse pulse(pid_t pid);

}  // namespace pipekern
