#include "cuda/memory.h"

#include <string>

#include "cuda/stream.h"
#include "transport/error.h"
#include "transport/header.h"

namespace pipekern::cuda {

DeviceMemory::DeviceMemory(std::shared_ptr<const Context> context, std::size_t bytes, unsigned char fill)
    : context_(std::move(context)), size_(align_up(bytes, kDevicePage)) {
    const Driver& driver = Driver::get();
    const Current current(*context_);
    const int result = driver.memory_allocate(&pointer_, size_);
    if (result == kOutOfMemory)
        throw Failure(Fault::kTransport, -1,
                      "device " + std::to_string(context_->device()) + " has no " + std::to_string(size_ >> 20) +
                          " MiB left for a link's slots: make micro-batches smaller, or leave it more memory");
    demand(result, "memory for slots");
    try {
        const Stream stream;
        demand(driver.fill(pointer_, fill, size_, stream.handle()), "filling slots");
        demand(driver.stream_synchronize(stream.handle()), "filling slots");
    } catch (...) {
        driver.memory_free(pointer_);
        throw;
    }
}

DeviceMemory::~DeviceMemory() {
    const Driver* driver = Driver::alive();
    if (!driver || !pointer_) return;
    if (driver->context_push(context_->handle()) != kSuccess) return;
    driver->memory_free(pointer_);
    ContextHandle before;
    driver->context_pop(&before);
}

IpcHandle DeviceMemory::export_handle() const {
    const Current current(*context_);
    IpcHandle handle;
    demand(Driver::get().ipc_get(&handle, pointer_), "an IPC handle");
    return handle;
}

ImportedMemory::ImportedMemory(std::shared_ptr<const Context> context, const IpcHandle& handle)
    : context_(std::move(context)) {
    const Current current(*context_);
    demand(Driver::get().ipc_open(&pointer_, handle, kIpcLazyPeerAccess), "opening a peer's memory over IPC");
}

ImportedMemory::~ImportedMemory() {
    const Driver* driver = Driver::alive();
    if (!driver || driver->context_push(context_->handle()) != kSuccess) return;
    driver->ipc_close(pointer_);
    ContextHandle before;
    driver->context_pop(&before);
}

RegisteredMemory::RegisteredMemory(std::shared_ptr<const Context> context, std::shared_ptr<Memory> memory)
    : context_(std::move(context)), memory_(std::move(memory)) {
    const Driver& driver = Driver::get();
    const Current current(*context_);
    demand(driver.host_register(memory_->data(), memory_->size(), kHostPortable | kHostDeviceMap),
           "registering shared host memory (raise `ulimit -l`?)");
    const int result = driver.host_pointer(&pointer_, memory_->data(), 0);
    if (result != kSuccess) driver.host_unregister(memory_->data());
    demand(result, "the device address of registered memory");
}

RegisteredMemory::~RegisteredMemory() {
    const Driver* driver = Driver::alive();
    if (!driver || driver->context_push(context_->handle()) != kSuccess) return;
    driver->host_unregister(memory_->data());
    ContextHandle before;
    driver->context_pop(&before);
}

}  // namespace pipekern::cuda
