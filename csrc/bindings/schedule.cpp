#include "bindings/bind.h"

namespace pipekern {

void bind_schedule(pybind11::module_&) {}

}  // namespace pipekern
