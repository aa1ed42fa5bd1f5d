// A stand-in for libcuda.so.1 that runs the transport's own code on a machine without a GPU. Streams are threads, a
// device's memory is a memfd, waits poll. The legacy default stream does everything at once, in the calling thread: the
// stream of a CPU. It shows order and protocol; it shows nothing of a GPU's memory model or speed.
#include "fake_driver.h"

#include <fcntl.h>

#include <cstdio>
#include <cstring>

#include "fake_kernels.h"
#include "fake_state.h"

using namespace fake;
using cuda::ContextHandle;
using cuda::EventHandle;
using cuda::FunctionHandle;
using cuda::IpcHandle;
using cuda::ModuleHandle;
using cuda::Pointer;
using cuda::StreamHandle;

#define API(name, ...) extern "C" FAKE_VISIBLE int name(__VA_ARGS__)
#define COUNTED \
    if (fails()) return kUnknown
#define IN_CONTEXT \
    COUNTED;       \
    if (current.empty()) return kInvalidContext

// For tests in Python.
extern "C" FAKE_VISIBLE const char* fake_leaks() {
    thread_local std::string text;
    text = leaks();
    return text.c_str();
}

API(cuInit, unsigned) {
    COUNTED;
    return 0;
}
API(cuDriverGetVersion, int* version) {
    COUNTED;
    *version = 13000;
    return 0;
}
API(cuGetErrorName, int result, const char** text) {
    *text = result == kUnknown ? "CUDA_ERROR_UNKNOWN" : "CUDA_ERROR_OF_THE_STAND_IN";
    return 0;
}
API(cuGetErrorString, int, const char** text) {
    *text = "the stand-in refuses";
    return 0;
}
API(cuDeviceGetCount, int* count) {
    COUNTED;
    *count = knobs().devices;
    return 0;
}
API(cuDeviceGet, int* device, int ordinal) {
    COUNTED;
    *device = ordinal;
    return 0;
}
API(cuDeviceGetName, char* name, int bytes, int device) {
    COUNTED;
    std::snprintf(name, static_cast<std::size_t>(bytes), "stand-in %d", device);
    return 0;
}
API(cuDeviceGetAttribute, int* value, int attribute, int) {
    COUNTED;
    *value = attribute == cuda::kComputeMajor ? 9 : attribute == cuda::kStreamMemoryOps64 && !knobs().no_stream_ops;
    return 0;
}
API(cuDeviceCanAccessPeer, int* can, int, int) {
    COUNTED;
    *can = !knobs().no_peer;
    return 0;
}
API(cuDevicePrimaryCtxRetain, ContextHandle* context, int device) {
    COUNTED;
    const std::lock_guard lock(state().mutex);
    Device& found = state().devices[device];
    found.ordinal = device;
    ++found.retained;
    *context = reinterpret_cast<ContextHandle>(&found);
    return 0;
}
API(cuDevicePrimaryCtxRelease_v2, int device) {
    const std::lock_guard lock(state().mutex);
    --state().devices[device].retained;
    return 0;
}
API(cuCtxPushCurrent_v2, ContextHandle context) {
    current.push_back(reinterpret_cast<Device*>(context));
    return 0;
}
API(cuCtxPopCurrent_v2, ContextHandle* context) {
    if (current.empty()) return kInvalidContext;
    *context = reinterpret_cast<ContextHandle>(current.back());
    current.pop_back();
    return 0;
}
API(cuCtxEnablePeerAccess, ContextHandle, unsigned) {
    IN_CONTEXT;
    return knobs().no_peer ? kPeerUnsupported : 0;
}
API(cuMemAlloc_v2, Pointer* pointer, std::size_t bytes) {
    IN_CONTEXT;
    const int fd = memfd_create("fake device", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) return cuda::kOutOfMemory;
    const int result = map(pointer, fd, bytes);
    const std::lock_guard lock(state().mutex);
    if (result == 0) state().allocations[*pointer] = {fd, bytes};
    return result;
}
API(cuMemFree_v2, Pointer pointer) {
    const std::lock_guard lock(state().mutex);
    if (!state().allocations.count(pointer)) return kInvalidValue;
    unmap(state().allocations, pointer);  // whoever still uses it faults
    return 0;
}
API(cuMemcpyAsync, Pointer target, Pointer source, std::size_t bytes, StreamHandle stream) {
    IN_CONTEXT;
    if (bytes == 0) return 0;
    return enqueue(stream, [=] { std::memcpy(at(target), at(source), bytes); });
}
API(cuMemsetD8Async, Pointer target, unsigned char byte, std::size_t bytes, StreamHandle stream) {
    IN_CONTEXT;
    // Fresh memory is zero; touching all of it would be most of what tests take.
    return enqueue(stream, [=] { std::memset(at(target), byte, byte ? bytes : 1); });
}
API(cuMemHostRegister_v2, void* data, std::size_t bytes, unsigned) {
    IN_CONTEXT;
    const std::lock_guard lock(state().mutex);
    return state().registered.emplace(reinterpret_cast<std::uintptr_t>(data), bytes).second ? 0 : kRegisteredAlready;
}
API(cuMemHostUnregister, void* data) {
    const std::lock_guard lock(state().mutex);
    return state().registered.erase(reinterpret_cast<std::uintptr_t>(data)) ? 0 : kInvalidValue;
}
API(cuMemHostGetDevicePointer_v2, Pointer* pointer, void* data, unsigned) {
    IN_CONTEXT;
    *pointer = reinterpret_cast<Pointer>(data);
    return 0;
}
API(cuIpcGetMemHandle, IpcHandle* handle, Pointer pointer) {
    IN_CONTEXT;
    if (knobs().no_ipc) return cuda::kNotSupported;
    const std::lock_guard lock(state().mutex);
    const Block& block = state().allocations.at(pointer);
    const Handle content{getpid(), block.fd, block.bytes};
    std::memcpy(handle->bytes, &content, sizeof content);
    return 0;
}
API(cuIpcOpenMemHandle_v2, Pointer* pointer, IpcHandle handle, unsigned) {
    IN_CONTEXT;
    Handle content;
    std::memcpy(&content, handle.bytes, sizeof content);
    if (content.pid == getpid()) return kInvalidContext;
    const std::string path = "/proc/" + std::to_string(content.pid) + "/fd/" + std::to_string(content.fd);
    const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) return kInvalidValue;
    const int result = map(pointer, fd, content.bytes);
    close(fd);
    const std::lock_guard lock(state().mutex);
    if (result == 0) state().imports[*pointer] = {-1, content.bytes};
    return result;
}
API(cuIpcCloseMemHandle, Pointer pointer) {
    const std::lock_guard lock(state().mutex);
    if (!state().imports.count(pointer)) return kInvalidValue;
    unmap(state().imports, pointer);
    return 0;
}
API(cuStreamCreate, StreamHandle* stream, unsigned) {
    IN_CONTEXT;
    auto* made = new Stream;
    made->queue = new_queue();
    const std::lock_guard lock(state().mutex);
    state().streams.insert(made);
    *stream = reinterpret_cast<StreamHandle>(made);
    return 0;
}
API(cuStreamDestroy_v2, StreamHandle stream) {
    {
        const std::lock_guard lock(state().mutex);
        state().streams.erase(stream);
    }
    delete reinterpret_cast<Stream*>(stream);
    return 0;
}
API(cuStreamQuery, StreamHandle stream) {
    if (!stream) return 0;
    auto& asked = *reinterpret_cast<Stream*>(stream);
    asked.asked.fetch_add(1);
    return asked.pending->load() ? cuda::kNotReady : 0;
}
API(cuStreamSynchronize, StreamHandle stream) {
    COUNTED;
    while (stream && reinterpret_cast<Stream*>(stream)->pending->load()) fake::pause();
    return 0;
}
API(cuStreamWaitEvent, StreamHandle stream, EventHandle event, unsigned) {
    IN_CONTEXT;
    const auto moment = reinterpret_cast<Event*>(event)->moment;
    return enqueue(stream, [moment, number = moment->recorded.load()] {
        while (moment->done.load() < number) fake::pause();
    });
}
API(cuStreamWaitValue64_v2, StreamHandle stream, Pointer flag, std::uint64_t value, unsigned) {
    IN_CONTEXT;
    if (knobs().no_stream_ops) return cuda::kNotSupported;
    if (!is_registered(flag)) return kInvalidValue;
    return enqueue(stream, [=] {
        while (static_cast<std::int64_t>(word(flag).load(std::memory_order_acquire) - value) < 0) fake::pause();
    });
}
API(cuStreamWriteValue64_v2, StreamHandle stream, Pointer flag, std::uint64_t value, unsigned) {
    IN_CONTEXT;
    if (knobs().no_stream_ops) return cuda::kNotSupported;
    if (!is_registered(flag)) return kInvalidValue;
    return enqueue(stream, [=] { word(flag).store(value, std::memory_order_release); });
}
API(cuLaunchHostFunc, StreamHandle stream, void (*function)(void*), void* data) {
    IN_CONTEXT;
    return enqueue(stream, [=] { function(data); });
}
API(cuEventCreate, EventHandle* event, unsigned) {
    IN_CONTEXT;
    auto* made = new Event;
    const std::lock_guard lock(state().mutex);
    state().events.insert(made);
    *event = reinterpret_cast<EventHandle>(made);
    return 0;
}
API(cuEventDestroy_v2, EventHandle event) {
    {
        const std::lock_guard lock(state().mutex);
        state().events.erase(event);
    }
    delete reinterpret_cast<Event*>(event);
    return 0;
}
API(cuEventRecord, EventHandle event, StreamHandle stream) {
    IN_CONTEXT;
    const auto moment = reinterpret_cast<Event*>(event)->moment;
    const std::uint64_t number = moment->recorded.fetch_add(1) + 1;
    return enqueue(stream, [moment, number] { moment->done.store(number); });
}
API(cuEventQuery, EventHandle event) {
    const auto& moment = *reinterpret_cast<Event*>(event)->moment;
    return moment.done.load() < moment.recorded.load() ? cuda::kNotReady : 0;
}
API(cuModuleLoadData, ModuleHandle* module, const void* image) {
    IN_CONTEXT;
    if (!image) return kInvalidValue;
    auto* made = new int;
    const std::lock_guard lock(state().mutex);
    state().modules.insert(made);
    *module = reinterpret_cast<ModuleHandle>(made);
    return 0;
}
API(cuModuleUnload, ModuleHandle module) {
    const std::lock_guard lock(state().mutex);
    state().modules.erase(module);
    delete reinterpret_cast<int*>(module);
    return 0;
}
API(cuModuleGetFunction, FunctionHandle* function, ModuleHandle, const char* name) {
    IN_CONTEXT;
    *function = reinterpret_cast<FunctionHandle>(find_kernel(name));
    return *function ? 0 : kNotFound;
}
API(cuLaunchKernel, FunctionHandle function, unsigned grid, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
    StreamHandle stream, void** arguments, void**) {
    IN_CONTEXT;
    if (grid == 0) return kInvalidValue;
    const auto kernel = reinterpret_cast<Kernel>(function);
    const auto tensor = *static_cast<Pointer*>(arguments[0]), slot = *static_cast<Pointer*>(arguments[1]);
    const auto count = *static_cast<std::uint64_t*>(arguments[2]);
    return enqueue(stream, [=] { kernel(at(tensor), at(slot), count); });
}
