#include "cuda/driver.h"

#include <dlfcn.h>

#include <atomic>

#include "transport/error.h"
#include "transport/fork.h"

namespace pipekern::cuda {
namespace {

struct Loaded {
    Driver driver{};
    std::string obstacle;
    std::atomic<bool> forked{false};
    ForkGuard guard{[this] { forked.store(true); }};

    Loaded() { obstacle = load(); }

    std::string load() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) return "no CUDA driver (libcuda.so.1) on this machine";
#define PIPEKERN_LOAD(field, symbol, arguments)                                 \
    driver.field = reinterpret_cast<int(*) arguments>(dlsym(library, #symbol)); \
    if (!driver.field) return "the CUDA driver has no " #symbol ": it is older than CUDA 12; update it";
        PIPEKERN_DRIVER_FUNCTIONS(PIPEKERN_LOAD)
#undef PIPEKERN_LOAD
        const int result = driver.init(0);
        if (result == kSuccess) return "";
        const char* text = nullptr;
        driver.error_string(result, &text);
        return "the CUDA driver does not start: " + std::string(text ? text : "unknown error") + " (" +
               std::to_string(result) + ")";
    }
};

// One driver a process; never unloaded, since streams and memory may outlive everything else.
Loaded& loaded() {
    static auto* loaded = new Loaded;
    return *loaded;
}

}  // namespace

std::string Driver::obstacle() {
    const Loaded& all = loaded();
    if (all.forked.load())
        return "this process was forked from one that uses CUDA, and cannot use it itself: start it with spawn or "
               "forkserver";
    return all.obstacle;
}

const Driver& Driver::get() {
    const std::string why = obstacle();
    if (!why.empty()) throw Failure(Fault::kTransport, -1, why);
    return loaded().driver;
}

const Driver* Driver::alive() noexcept {
    const Loaded& all = loaded();
    return all.obstacle.empty() && !all.forked.load() ? &all.driver : nullptr;
}

void demand(int result, const char* tried) {
    if (result == kSuccess) return;
    const Driver& driver = Driver::get();
    const char *name = nullptr, *text = nullptr;
    driver.error_name(result, &name);
    driver.error_string(result, &text);
    throw Failure(Fault::kTransport, -1,
                  "CUDA refused " + std::string(tried) + ": " + (name ? name : "error") + " (" +
                      std::to_string(result) + "), " + (text ? text : "unknown"));
}

int device_handle(int ordinal) {
    int device = 0;
    demand(Driver::get().device_get(&device, ordinal), "the device of an ordinal");
    return device;
}

int device_attribute(int attribute, int ordinal) {
    int value = 0;
    demand(Driver::get().device_attribute(&value, attribute, device_handle(ordinal)), "an attribute of a device");
    return value;
}

}  // namespace pipekern::cuda
