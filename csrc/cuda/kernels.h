// The kernels of csrc/cuda/kernels on one device, loaded when the first is needed.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "cuda/context.h"
#include "cuda/parcel.h"

namespace pipekern::cuda {

class Kernels {
  public:
    explicit Kernels(std::shared_ptr<const Context> context) : context_(std::move(context)) {}
    ~Kernels();
    Kernels(const Kernels&) = delete;
    Kernels& operator=(const Kernels&) = delete;

    // All in the current context. `slot` is where the message's tensors begin.
    // The tensor into its place in the slot.
    void put(const Part& part, Pointer slot, Pointer tensor, StreamHandle stream);
    // The tensor out of the slot.
    void take(const Part& part, Pointer tensor, Pointer slot, StreamHandle stream);
    // Whether tensors of this type can be added to: fp32, bf16, fp16.
    static bool adds(std::uint8_t dtype);
    // The tensor in the slot, added to `tensor`.
    void add(const Part& part, Pointer tensor, Pointer slot, StreamHandle stream);

    // Where the kernels come from: "embedded", "NVRTC: its path", or why there are none.
    static std::string origin();

  private:
    void launch(const char* name, const Part& part, Pointer tensor, Pointer slot, StreamHandle stream);

    std::shared_ptr<const Context> context_;
    std::mutex mutex_;
    ModuleHandle module_ = nullptr;
};

}  // namespace pipekern::cuda
