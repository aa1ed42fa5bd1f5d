// The kernels compiled at run time, where NVRTC is installed: it needs no device.
#include <cstdio>

#include "check.h"
#include "cuda/kernels.h"
#include "cuda/nvrtc.h"

using namespace pipekern;

int main() {
    const std::string origin = cuda::nvrtc_origin();
    if (origin.rfind("NVRTC", 0) != 0) {
        CHECK(origin.find("libnvrtc.so cannot be loaded") != std::string::npos);
        CHECK_RAISES(Fault::kTransport, -1, "libnvrtc.so cannot be loaded", cuda::compile("sm_90"));
        std::puts("skipped: libnvrtc is not installed");
        return 0;
    }
    const std::string image = cuda::compile("sm_90");
    CHECK(image.compare(0, 4,
                        "\x7f"
                        "ELF") == 0);
    for (const char* name : {"pk_put_f32_bf16", "pk_put_bf16_e4m3", "pk_take_e4m3_f32", "pk_add_f16"})
        CHECK(image.find(name) != std::string::npos);
    CHECK_RAISES(Fault::kTransport, -1, "cannot compile the kernels", cuda::compile("sm_1"));
}
