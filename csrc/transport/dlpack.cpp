#include "transport/dlpack.h"

#include "transport/error.h"

namespace pipekern {
namespace {

constexpr std::int32_t kCpu = 1;

struct View {
    DLManagedTensor tensor;
    std::vector<std::int64_t> shape;
    std::shared_ptr<const Arrival> arrival;
};

void release(DLManagedTensor* tensor) { delete static_cast<View*>(tensor->manager_ctx); }

bool fits(std::uint64_t offset, unsigned __int128 bytes, std::uint64_t payload) {
    return offset <= payload && bytes <= payload - offset;
}

}  // namespace

DLManagedTensor* view_of(std::shared_ptr<const Arrival> arrival, std::uint64_t offset, std::uint8_t dtype,
                         std::vector<std::int64_t> shape) {
    unsigned __int128 bytes = dtype < kDtypeCount ? kDtypes[dtype].bits / 8 : 0;
    bool sane = bytes != 0;
    for (std::int64_t dim : shape) {
        sane = sane && dim >= 0 && bytes >> 64 == 0;
        bytes *= static_cast<std::uint64_t>(dim);
    }
    if (!sane || !fits(offset, bytes, arrival->header().bytes))
        throw Failure(Fault::kTransport, -1, "a tensor reaches beyond its message");

    auto* view = new View{{}, std::move(shape), std::move(arrival)};
    DLTensor& tensor = view->tensor.dl_tensor;
    tensor.data = view->arrival->payload() + offset;
    tensor.device = {kCpu, 0};
    tensor.ndim = static_cast<std::int32_t>(view->shape.size());
    tensor.dtype = {kDtypes[dtype].code, kDtypes[dtype].bits, 1};
    tensor.shape = view->shape.data();
    view->tensor.manager_ctx = view;
    view->tensor.deleter = release;
    return &view->tensor;
}

DLManagedTensor* view_of(std::shared_ptr<const Arrival> arrival) {
    const Header& header = arrival->header();
    std::vector<std::int64_t> shape(header.shape, header.shape + header.ndim);
    const std::uint8_t dtype = header.dtype;
    return view_of(std::move(arrival), 0, dtype, std::move(shape));
}

}  // namespace pipekern
