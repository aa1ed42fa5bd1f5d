// DLPack's structures, version 1, and views of a message in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "transport/receiver.h"

namespace pipekern {

extern "C" {
struct DLDevice {
    std::int32_t device_type;
    std::int32_t device_id;
};
struct DLDataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};
struct DLPackVersion {
    std::uint32_t major;
    std::uint32_t minor;
};
struct DLManagedTensorVersioned {
    DLPackVersion version;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned*);
    std::uint64_t flags;
    DLTensor dl_tensor;
};
}
constexpr std::int32_t kDlpackCpu = 1;
constexpr std::int32_t kDlpackCuda = 2;
constexpr std::uint32_t kDlpackMajor = 1;

// Memory that belongs to a message.
struct Span {
    void* data;
    std::uint64_t bytes;
    DLDevice device;
};

// A contiguous tensor in the span, `offset` bytes from its start; it refers to the message until its deleter is called.
// `dtype` is a place in kDtypes. Raises where it would reach beyond the span.
DLManagedTensorVersioned* view_of(std::shared_ptr<const void> message, const Span& span, std::uint64_t offset,
                                  std::uint8_t dtype, std::vector<std::int64_t> shape);

// The same in the message's payload.
DLManagedTensorVersioned* view_of(std::shared_ptr<const Arrival> arrival, std::uint64_t offset, std::uint8_t dtype,
                                  std::vector<std::int64_t> shape);

// The one tensor of a message that is not a bundle.
DLManagedTensorVersioned* view_of(std::shared_ptr<const Arrival> arrival);

}  // namespace pipekern
