// The kernels compiled at run time, where nvcc was not there to build them.
#pragma once

#include <string>

namespace pipekern::cuda {

// The image for an architecture, "sm_90". Raises with the compiler's own text.
std::string compile(const std::string& architecture);

// "NVRTC: the library's name", or why it cannot be had.
std::string nvrtc_origin();

}  // namespace pipekern::cuda
