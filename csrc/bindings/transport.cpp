#include "bindings/bind.h"
#include "transport/digest.h"

namespace pipekern {

void bind_transport(pybind11::module_& m) {
    m.def("digest", [](std::uintptr_t pointer, std::size_t bytes, std::uint64_t seed) {
        return digest(reinterpret_cast<const void*>(pointer), bytes, seed);
    });
}

}  // namespace pipekern
