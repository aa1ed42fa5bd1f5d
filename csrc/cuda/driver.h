// The functions of the CUDA driver that pipekern calls, found in libcuda.so.1 at run time: the extension needs neither
// the driver to load nor CUDA's headers to build. Names and signatures are those of cuda.h, with the suffixes that its
// macros add.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pipekern::cuda {

using Pointer = std::uint64_t;  // CUdeviceptr
using ContextHandle = struct OpaqueContext*;
using StreamHandle = struct OpaqueStream*;  // nullptr: the legacy default stream of the current context
using EventHandle = struct OpaqueEvent*;
using ModuleHandle = struct OpaqueModule*;
using FunctionHandle = struct OpaqueFunction*;

struct IpcHandle {
    char bytes[64];
};

// CUresult
constexpr int kSuccess = 0, kOutOfMemory = 2, kNotReady = 600, kPeerAccessAlreadyEnabled = 704, kNotSupported = 801;

// CUdevice_attribute
constexpr int kComputeMajor = 75, kComputeMinor = 76, kStreamMemoryOps64 = 122;

constexpr unsigned kStreamNonBlocking = 1, kEventDisableTiming = 2, kHostPortable = 1, kHostDeviceMap = 2,
                   kIpcLazyPeerAccess = 1, kWaitGreaterOrEqual = 0, kWriteWithFence = 0;

// Field, symbol, arguments.
#define PIPEKERN_DRIVER_FUNCTIONS(X)                                                                                   \
    X(init, cuInit, (unsigned flags))                                                                                  \
    X(driver_version, cuDriverGetVersion, (int* version))                                                              \
    X(error_name, cuGetErrorName, (int result, const char** text))                                                     \
    X(error_string, cuGetErrorString, (int result, const char** text))                                                 \
    X(device_count, cuDeviceGetCount, (int* count))                                                                    \
    X(device_get, cuDeviceGet, (int* device, int ordinal))                                                             \
    X(device_name, cuDeviceGetName, (char* name, int bytes, int device))                                               \
    X(device_attribute, cuDeviceGetAttribute, (int* value, int attribute, int device))                                 \
    X(can_access_peer, cuDeviceCanAccessPeer, (int* can, int device, int peer))                                        \
    X(context_retain, cuDevicePrimaryCtxRetain, (ContextHandle * context, int device))                                 \
    X(context_release, cuDevicePrimaryCtxRelease_v2, (int device))                                                     \
    X(context_push, cuCtxPushCurrent_v2, (ContextHandle context))                                                      \
    X(context_pop, cuCtxPopCurrent_v2, (ContextHandle * context))                                                      \
    X(enable_peer_access, cuCtxEnablePeerAccess, (ContextHandle peer, unsigned flags))                                 \
    X(memory_allocate, cuMemAlloc_v2, (Pointer * pointer, std::size_t bytes))                                          \
    X(memory_free, cuMemFree_v2, (Pointer pointer))                                                                    \
    X(copy, cuMemcpyAsync, (Pointer target, Pointer source, std::size_t bytes, StreamHandle stream))                   \
    X(fill, cuMemsetD8Async, (Pointer target, unsigned char byte, std::size_t bytes, StreamHandle stream))             \
    X(host_register, cuMemHostRegister_v2, (void* data, std::size_t bytes, unsigned flags))                            \
    X(host_unregister, cuMemHostUnregister, (void* data))                                                              \
    X(host_pointer, cuMemHostGetDevicePointer_v2, (Pointer * pointer, void* data, unsigned flags))                     \
    X(ipc_get, cuIpcGetMemHandle, (IpcHandle * handle, Pointer pointer))                                               \
    X(ipc_open, cuIpcOpenMemHandle_v2, (Pointer * pointer, IpcHandle handle, unsigned flags))                          \
    X(ipc_close, cuIpcCloseMemHandle, (Pointer pointer))                                                               \
    X(stream_create, cuStreamCreate, (StreamHandle * stream, unsigned flags))                                          \
    X(stream_destroy, cuStreamDestroy_v2, (StreamHandle stream))                                                       \
    X(stream_query, cuStreamQuery, (StreamHandle stream))                                                              \
    X(stream_synchronize, cuStreamSynchronize, (StreamHandle stream))                                                  \
    X(stream_wait_event, cuStreamWaitEvent, (StreamHandle stream, EventHandle event, unsigned flags))                  \
    X(stream_wait_value, cuStreamWaitValue64_v2,                                                                       \
      (StreamHandle stream, Pointer flag, std::uint64_t value, unsigned flags))                                        \
    X(stream_write_value, cuStreamWriteValue64_v2,                                                                     \
      (StreamHandle stream, Pointer flag, std::uint64_t value, unsigned flags))                                        \
    X(launch_host, cuLaunchHostFunc, (StreamHandle stream, void (*function)(void*), void* data))                       \
    X(event_create, cuEventCreate, (EventHandle * event, unsigned flags))                                              \
    X(event_destroy, cuEventDestroy_v2, (EventHandle event))                                                           \
    X(event_record, cuEventRecord, (EventHandle event, StreamHandle stream))                                           \
    X(event_query, cuEventQuery, (EventHandle event))                                                                  \
    X(module_load, cuModuleLoadData, (ModuleHandle * module, const void* image))                                       \
    X(module_unload, cuModuleUnload, (ModuleHandle module))                                                            \
    X(module_function, cuModuleGetFunction, (FunctionHandle * function, ModuleHandle module, const char* name))        \
    X(launch_kernel, cuLaunchKernel,                                                                                   \
      (FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, \
       unsigned block_z, unsigned shared_bytes, StreamHandle stream, void** arguments, void** extra))

struct Driver {
#define PIPEKERN_FIELD(field, symbol, arguments) int(*field) arguments;
    PIPEKERN_DRIVER_FUNCTIONS(PIPEKERN_FIELD)
#undef PIPEKERN_FIELD

    // The loaded and initialised driver. Raises where there is none, and in a child forked after it was loaded: there
    // CUDA cannot be used.
    static const Driver& get();

    // The same for destructors: nothing where get() would raise.
    static const Driver* alive() noexcept;

    // Why get() would raise; empty where it would not.
    static std::string obstacle();
};

// Raises for any result but success: what was tried, and the driver's words.
void demand(int result, const char* tried);

// The CUdevice of an ordinal.
int device_handle(int ordinal);

int device_attribute(int attribute, int ordinal);

}  // namespace pipekern::cuda
