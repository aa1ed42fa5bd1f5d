#include "transport/process.h"

#include <fcntl.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string>

#include "transport/fd.h"

namespace pipekern {

Pulse pulse(pid_t pid) {
    char text[512] = {};
    const Fd file(open(("/proc/" + std::to_string(pid) + "/stat").c_str(), O_RDONLY | O_CLOEXEC));
    if (!file || read(file.get(), text, sizeof text - 1) <= 0) return {};
    // The second field is a name in parentheses, which may hold anything; then come the state and, twelfth and
    // thirteenth from there, the ticks.
    const char* name_end = std::strrchr(text, ')');
    char state = 0;
    std::uint64_t user = 0, system = 0;
    constexpr const char* kFields = ") %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %" SCNu64 " %" SCNu64;
    if (!name_end || std::sscanf(name_end, kFields, &state, &user, &system) != 3) return {};
    return {user + system, state == 't'};
}

}  // namespace pipekern
