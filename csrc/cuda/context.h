// A device's primary context, the one that torch uses.
#pragma once

#include <memory>

#include "cuda/driver.h"

namespace pipekern::cuda {

class Context {
  public:
    explicit Context(int device);
    ~Context();
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    int device() const { return device_; }
    ContextHandle handle() const { return handle_; }
    // Whether streams can wait for words of memory and write them.
    bool has_stream_memory_ops() const { return stream_memory_ops_; }

    // Empty where this device's copies and kernels can reach `peer`'s memory, after making it so; else why not.
    std::string reach(const Context& peer) const;

  private:
    int device_;         // ordinal
    int cu_device_ = 0;  // CUdevice
    ContextHandle handle_ = nullptr;
    bool stream_memory_ops_ = false;
};

// While it lives, the context is this thread's current one.
class Current {
  public:
    explicit Current(const Context& context);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
};

}  // namespace pipekern::cuda
