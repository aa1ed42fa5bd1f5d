// A stand-in for libnvrtc.so.13: the stand-in driver runs kernels of its own, so that any image will do. It checks what
// it is given, and returns the source.
#include <cstring>
#include <string>

#include "fake_driver.h"

namespace {

struct Program {
    std::string text;
};
constexpr int kInvalidInput = 3;

}  // namespace

#define API(name, ...) extern "C" FAKE_VISIBLE int name(__VA_ARGS__)

API(nvrtcCreateProgram, Program** program, const char* source, const char*, int count, const char* const* headers,
    const char* const* names) {
    if (count != 1 || !std::strstr(source, names[0]) || !std::strstr(headers[0], "e4m3_of")) return kInvalidInput;
    *program = new Program{source};
    return 0;
}
API(nvrtcDestroyProgram, Program** program) {
    delete *program;
    return 0;
}
API(nvrtcCompileProgram, Program*, int count, const char* const* options) {
    return count > 0 && std::strncmp(options[0], "-arch=sm_", 9) == 0 ? 0 : kInvalidInput;
}
API(nvrtcGetProgramLogSize, Program*, std::size_t* bytes) {
    *bytes = 0;
    return 0;
}
API(nvrtcGetProgramLog, Program*, char*) { return 0; }
API(nvrtcGetCUBINSize, Program* program, std::size_t* bytes) {
    *bytes = program->text.size();
    return 0;
}
API(nvrtcGetCUBIN, Program* program, char* image) {
    std::memcpy(image, program->text.data(), program->text.size());
    return 0;
}
