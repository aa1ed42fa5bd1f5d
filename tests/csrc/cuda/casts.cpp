// The casts and kernels of a link on the host, for tests that compare them with torch.
#include "fake_driver.h"
#include "fake_kernels.h"

namespace {

void e4m3_of_f32(void* tensor, void* slot, fake::u64 count) {
    for (fake::u64 i = 0; i < count; ++i) fake::write(slot, i, fake::e4m3_of(fake::read<float>(tensor, i)));
}

void f32_of_e4m3(void* tensor, void* slot, fake::u64 count) {
    for (fake::u64 i = 0; i < count; ++i) fake::write(tensor, i, fake::float_of_e4m3(fake::read<fake::u8>(slot, i)));
}

fake::Kernel find(const std::string& name) {
    if (name == "f16_of_f32")
        return [](void* in, void* out, fake::u64 n) { fake::convert<fake::F32, fake::F16, false>(out, in, n); };
    if (name == "f32_of_f16") return fake::take<fake::F16, fake::F32, false>;
    if (name == "e4m3_of_f32") return e4m3_of_f32;
    if (name == "f32_of_e4m3") return f32_of_e4m3;
    return fake::find_kernel(name);
}

}  // namespace

// `name` is a kernel's, or one of the casts alone. Returns 0 for a name that is not known.
extern "C" FAKE_VISIBLE int run(const char* name, void* tensor, void* slot, unsigned long long count) {
    const fake::Kernel kernel = find(name);
    if (kernel) kernel(tensor, slot, count);
    return kernel != nullptr;
}
