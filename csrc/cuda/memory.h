// Memory that devices reach: a device's own, a peer's opened over IPC, and the host's, registered. Each is given back
// by its destructor.
#pragma once

#include <memory>

#include "cuda/context.h"
#include "transport/memory.h"

namespace pipekern::cuda {

// Slots are allocations of their own, apart from torch's allocator, in whole pages of the device: an IPC handle names
// an allocation, and one of expandable segments has none.
constexpr std::size_t kDevicePage = std::size_t{2} << 20;

class DeviceMemory {
  public:
    // At least `bytes`, every one of them `fill`; waits until they are, on a stream of its own.
    DeviceMemory(std::shared_ptr<const Context> context, std::size_t bytes, unsigned char fill);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    Pointer pointer() const { return pointer_; }
    std::size_t size() const { return size_; }
    IpcHandle export_handle() const;
    // The process keeps it until it ends: somebody else may still be using it.
    void abandon() { pointer_ = 0; }

  private:
    std::shared_ptr<const Context> context_;
    Pointer pointer_ = 0;
    std::size_t size_;
};

class ImportedMemory {
  public:
    ImportedMemory(std::shared_ptr<const Context> context, const IpcHandle& handle);
    ~ImportedMemory();
    ImportedMemory(const ImportedMemory&) = delete;
    ImportedMemory& operator=(const ImportedMemory&) = delete;

    Pointer pointer() const { return pointer_; }

  private:
    std::shared_ptr<const Context> context_;
    Pointer pointer_ = 0;
};

class RegisteredMemory {
  public:
    RegisteredMemory(std::shared_ptr<const Context> context, std::shared_ptr<Memory> memory);
    ~RegisteredMemory();
    RegisteredMemory(const RegisteredMemory&) = delete;
    RegisteredMemory& operator=(const RegisteredMemory&) = delete;

    const std::shared_ptr<Memory>& host() const { return memory_; }
    // Where the devices of this process see it.
    Pointer pointer() const { return pointer_; }
    Pointer pointer_to(const void* place) const {
        return pointer_ + static_cast<std::uint64_t>(static_cast<const std::byte*>(place) - memory_->data());
    }

  private:
    std::shared_ptr<const Context> context_;
    std::shared_ptr<Memory> memory_;
    Pointer pointer_ = 0;
};

}  // namespace pipekern::cuda
