#include "transport/dlpack.h"

#include "transport/error.h"

namespace pipekern {
namespace {

struct View {
    DLManagedTensorVersioned tensor;
    std::vector<std::int64_t> shape;  // then the strides
    std::shared_ptr<const void> message;
};

void release(DLManagedTensorVersioned* tensor) { delete static_cast<View*>(tensor->manager_ctx); }

bool fits(std::uint64_t offset, unsigned __int128 bytes, std::uint64_t payload) {
    return offset <= payload && bytes <= payload - offset;
}

}  // namespace

DLManagedTensorVersioned* view_of(std::shared_ptr<const void> message, const Span& span, std::uint64_t offset,
                                  std::uint8_t dtype, std::vector<std::int64_t> shape) {
    unsigned __int128 bytes = dtype < kDtypeCount ? kDtypes[dtype].bits / 8 : 0;
    bool sane = bytes != 0;
    for (std::int64_t dim : shape) {
        sane = sane && dim >= 0 && bytes >> 64 == 0;
        bytes *= static_cast<std::uint64_t>(dim);
    }
    if (!sane || !fits(offset, bytes, span.bytes))
        throw Failure(Fault::kTransport, -1, "a tensor reaches beyond its message");

    const std::size_t ndim = shape.size();
    shape.resize(2 * ndim);
    for (std::size_t i = ndim; i-- > 0;) shape[ndim + i] = i + 1 < ndim ? shape[ndim + i + 1] * shape[i + 1] : 1;
    auto* view = new View{{}, std::move(shape), std::move(message)};
    DLTensor& tensor = view->tensor.dl_tensor;
    tensor.data = static_cast<std::byte*>(span.data) + offset;
    tensor.device = span.device;
    tensor.ndim = static_cast<std::int32_t>(ndim);
    tensor.dtype = {kDtypes[dtype].code, kDtypes[dtype].bits, 1};
    tensor.shape = view->shape.data();
    tensor.strides = tensor.shape + ndim;
    view->tensor.version = {kDlpackMajor, 0};
    view->tensor.manager_ctx = view;
    view->tensor.deleter = release;
    return &view->tensor;
}

DLManagedTensorVersioned* view_of(std::shared_ptr<const Arrival> arrival, std::uint64_t offset, std::uint8_t dtype,
                                  std::vector<std::int64_t> shape) {
    const Span payload{arrival->payload(), arrival->header().bytes, {kDlpackCpu, 0}};
    return view_of(std::move(arrival), payload, offset, dtype, std::move(shape));
}

DLManagedTensorVersioned* view_of(std::shared_ptr<const Arrival> arrival) {
    const Header& header = arrival->header();
    std::vector<std::int64_t> shape(header.shape, header.shape + header.ndim);
    const std::uint8_t dtype = header.dtype;
    return view_of(std::move(arrival), 0, dtype, std::move(shape));
}

}  // namespace pipekern
