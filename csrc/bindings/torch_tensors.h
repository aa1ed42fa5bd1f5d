// torch's tensors without torch's headers: the table of C functions that torch.Tensor carries for DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "transport/dlpack.h"

namespace pipekern {

// A tensor's memory, which can be copied as it stands, whatever its device. `dtype` is a place in kDtypes; `shape`
// lives as long as the tensor does.
struct PlainTensor {
    const void* data;
    std::uint64_t bytes;
    std::int32_t ndim;
    const std::int64_t* shape;
    std::uint8_t dtype;
    DLDevice device;
};

class TorchTensors {
  public:
    // Imports torch when first called. Raises ImportError for a torch without the table (before 2.10).
    static const TorchTensors& get();

    // Nothing for what is no dense, contiguous torch.Tensor or Parameter of a type in kDtypes.
    std::optional<PlainTensor> plain(pybind11::handle tensor) const;

    // A torch.Tensor over `managed`, which it takes.
    pybind11::object over(DLManagedTensorVersioned* managed) const;

  private:
    TorchTensors();

    struct Table;
    const Table* table_;
    PyTypeObject* tensor_;
    PyTypeObject* parameter_;
    PyObject* is_conj_;
    PyObject* is_neg_;
};

}  // namespace pipekern
