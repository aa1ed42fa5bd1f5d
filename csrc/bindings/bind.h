// One function a subject: each adds its names to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace pipekern {

void bind_transport(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_staged(pybind11::module_& m);
void bind_schedule(pybind11::module_& m);
void bind_search(pybind11::module_& m);
void bind_plan(pybind11::module_& m);

}  // namespace pipekern
