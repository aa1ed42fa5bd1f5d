#include "cuda/kernels.h"

#include "cuda/image.h"
#include "cuda/nvrtc.h"
#include "transport/error.h"
#include "transport/header.h"

namespace pipekern::cuda {
namespace {

constexpr unsigned kThreads = 256;

// By Cast.
constexpr const char* kPut[] = {nullptr, "pk_put_f32_bf16", "pk_put_f32_e4m3", "pk_put_bf16_e4m3", "pk_put_f16_e4m3"};
constexpr const char* kTake[] = {nullptr, "pk_take_bf16_f32", "pk_take_e4m3_f32", "pk_take_e4m3_bf16",
                                 "pk_take_e4m3_f16"};
constexpr const char* kAdd[] = {nullptr, "pk_add_bf16_f32", "pk_add_e4m3_f32", "pk_add_e4m3_bf16", "pk_add_e4m3_f16"};

const char* add_without_cast(std::uint8_t dtype) {
    const auto [code, bits] = kDtypes[dtype];
    if (code == kFloat && bits == 32) return "pk_add_f32";
    if (code == kFloat && bits == 16) return "pk_add_f16";
    return code == kBfloat ? "pk_add_bf16" : nullptr;
}

std::string architecture(int device) {
    return "sm_" + std::to_string(device_attribute(kComputeMajor, device)) +
           std::to_string(device_attribute(kComputeMinor, device));
}

}  // namespace

Kernels::~Kernels() {
    const Driver* driver = Driver::alive();
    if (!module_ || !driver || driver->context_push(context_->handle()) != kSuccess) return;
    driver->module_unload(module_);
    ContextHandle before;
    driver->context_pop(&before);
}

void Kernels::put(const Part& part, Pointer slot, Pointer tensor, StreamHandle stream) {
    if (part.cast == Cast::kCopy)
        demand(Driver::get().copy(slot + part.offset, tensor, part.bytes, stream), "a copy into a slot");
    else
        launch(kPut[static_cast<int>(part.cast)], part, tensor, slot, stream);
}

void Kernels::take(const Part& part, Pointer tensor, Pointer slot, StreamHandle stream) {
    if (part.cast == Cast::kCopy)
        demand(Driver::get().copy(tensor, slot + part.offset, part.bytes, stream), "a copy out of a slot");
    else
        launch(kTake[static_cast<int>(part.cast)], part, tensor, slot, stream);
}

bool Kernels::adds(std::uint8_t dtype) { return add_without_cast(dtype) != nullptr; }

void Kernels::add(const Part& part, Pointer tensor, Pointer slot, StreamHandle stream) {
    const int cast = static_cast<int>(part.cast);
    launch(cast ? kAdd[cast] : add_without_cast(part.dtype), part, tensor, slot, stream);
}

void Kernels::launch(const char* name, const Part& part, Pointer tensor, Pointer slot, StreamHandle stream) {
    const Driver& driver = Driver::get();
    const std::lock_guard lock(mutex_);
    if (!module_) {
        const std::string compiled = kImageBytes ? "" : compile(architecture(context_->device()));
        const void* image = kImageBytes ? static_cast<const void*>(kImage) : compiled.data();
        demand(driver.module_load(&module_, image), "loading the kernels");
    }
    FunctionHandle function;
    demand(driver.module_function(&function, module_, name), "finding a kernel");
    Pointer place = slot + part.offset;
    std::uint64_t elements = part.elements;
    void* arguments[] = {&tensor, &place, &elements};
    const bool wide = part.cast != Cast::kCopy && part.cast != Cast::kF32Bf16;  // in e4m3
    const std::uint64_t values = kThreads * (wide ? 16 : 8);
    const auto blocks = static_cast<unsigned>((elements + values - 1) / values);
    demand(driver.launch_kernel(function, blocks, 1, 1, kThreads, 1, 1, 0, stream, arguments, nullptr), name);
}

std::string Kernels::origin() { return kImageBytes ? "embedded" : nvrtc_origin(); }

}  // namespace pipekern::cuda
