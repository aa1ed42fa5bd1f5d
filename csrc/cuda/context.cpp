#include "cuda/context.h"

#include "transport/error.h"

namespace pipekern::cuda {

Context::Context(int device) : device_(device) {
    const Driver& driver = Driver::get();
    int count = 0;
    demand(driver.device_count(&count), "counting devices");
    if (device < 0 || device >= count)
        throw Failure(
            Fault::kTransport, -1,
            "there is no CUDA device " + std::to_string(device) + ": this process sees " + std::to_string(count));
    stream_memory_ops_ = device_attribute(kStreamMemoryOps64, device) != 0;
    cu_device_ = device_handle(device);
    demand(driver.context_retain(&handle_, cu_device_), "the context of a device");
}

Context::~Context() {
    if (const Driver* driver = Driver::alive()) driver->context_release(cu_device_);
}

std::string Context::reach(const Context& peer) const {
    if (peer.device_ == device_) return "";
    const Driver& driver = Driver::get();
    int can = 0;
    demand(driver.can_access_peer(&can, cu_device_, peer.cu_device_), "asking for peer access");
    const std::string pair = "device " + std::to_string(device_) + " to device " + std::to_string(peer.device_);
    if (!can) return "no peer access from " + pair;
    const Current current(*this);
    const int result = driver.enable_peer_access(peer.handle_, 0);
    if (result == kSuccess || result == kPeerAccessAlreadyEnabled) return "";
    return "peer access from " + pair + " is refused with error " + std::to_string(result);
}

Current::Current(const Context& context) {
    demand(Driver::get().context_push(context.handle()), "making a context current");
}

Current::~Current() {
    ContextHandle before;
    if (const Driver* driver = Driver::alive()) driver->context_pop(&before);
}

}  // namespace pipekern::cuda
