// The kernels compiled at run time, where nvcc was not there to build them.
#pragma once

#include <string>

namespace pipekern::cuda {

// The image for a device. Raises with the compiler's own text.
std::string compile(int device);

// "NVRTC: the library's name", or why it cannot be had.
std::string nvrtc_origin();

}  // namespace pipekern::cuda
