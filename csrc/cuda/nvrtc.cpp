#include "cuda/nvrtc.h"

#include <dlfcn.h>

#include "cuda/image.h"
#include "transport/error.h"

namespace pipekern::cuda {
namespace {

using Program = struct OpaqueProgram*;

// Field, symbol, arguments.
#define PIPEKERN_NVRTC_FUNCTIONS(X)                                                                    \
    X(create, nvrtcCreateProgram,                                                                      \
      (Program * program, const char* source, const char* name, int count, const char* const* headers, \
       const char* const* names))                                                                      \
    X(destroy, nvrtcDestroyProgram, (Program * program))                                               \
    X(run, nvrtcCompileProgram, (Program program, int count, const char* const* options))              \
    X(log_size, nvrtcGetProgramLogSize, (Program program, std::size_t* bytes))                         \
    X(log, nvrtcGetProgramLog, (Program program, char* text))                                          \
    X(cubin_size, nvrtcGetCUBINSize, (Program program, std::size_t* bytes))                            \
    X(cubin, nvrtcGetCUBIN, (Program program, char* image))

struct Nvrtc {
#define PIPEKERN_FIELD(field, symbol, arguments) int(*field) arguments = nullptr;
    PIPEKERN_NVRTC_FUNCTIONS(PIPEKERN_FIELD)
#undef PIPEKERN_FIELD
    std::string library, obstacle;

    Nvrtc() {
        void* handle = nullptr;
        // torch brings one and has loaded it under its name where it has used it.
        for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"}) {
            handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
            library = name;
            if (handle) break;
        }
        if (!handle) {
            obstacle =
                "this build has no kernels (nvcc was not there), and libnvrtc.so cannot be loaded to compile "
                "them: put it on LD_LIBRARY_PATH, or install pipekern again with nvcc on the PATH";
            return;
        }
#define PIPEKERN_LOAD(field, symbol, arguments)                         \
    field = reinterpret_cast<int(*) arguments>(dlsym(handle, #symbol)); \
    if (!field) obstacle = library + " has no " #symbol ": it is too old";
        PIPEKERN_NVRTC_FUNCTIONS(PIPEKERN_LOAD)
#undef PIPEKERN_LOAD
    }
};

const Nvrtc& nvrtc() {
    static const auto* loaded = new Nvrtc;
    return *loaded;
}

}  // namespace

std::string compile(const std::string& architecture) {
    const Nvrtc& library = nvrtc();
    if (!library.obstacle.empty()) throw Failure(Fault::kTransport, -1, library.obstacle);
    const char* const header_name = "cast.h";
    Program program = nullptr;
    if (library.create(&program, kCodecSource, "codec.cu", 1, &kCastSource, &header_name) != 0)
        throw Failure(Fault::kTransport, -1, library.library + " refuses the kernels' source");
    const std::string target = "-arch=" + architecture;
    const char* const options[] = {target.c_str(), "-std=c++17"};
    const bool compiled = library.run(program, 2, options) == 0;
    std::size_t bytes = 0;
    compiled ? library.cubin_size(program, &bytes) : library.log_size(program, &bytes);
    std::string text(bytes, '\0');
    compiled ? library.cubin(program, text.data()) : library.log(program, text.data());
    library.destroy(&program);
    if (!compiled) throw Failure(Fault::kTransport, -1, library.library + " cannot compile the kernels: " + text);
    return text;
}

std::string nvrtc_origin() {
    const Nvrtc& library = nvrtc();
    return library.obstacle.empty() ? "NVRTC: " + library.library : library.obstacle;
}

}  // namespace pipekern::cuda
