# Writes ${CMAKE_BINARY_DIR}/image.cpp: the kernels as nvcc compiles them, where it is there, and their source, which NVRTC
# compiles at run time where it was not. PIPEKERN_KERNELS says which, and why.
set(kernels ${CMAKE_SOURCE_DIR}/csrc/cuda/kernels)
set(fatbin ${CMAKE_BINARY_DIR}/codec.fatbin)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${kernels}/codec.cu ${kernels}/cast.h)

# nvcc may be a wrapper outside its toolkit's folder, so it is only run, not looked around from.
find_program(PIPEKERN_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
set(image "")
if(PIPEKERN_NVCC)
  execute_process(
    COMMAND ${PIPEKERN_NVCC} -fatbin -O3 -std=c++17 -gencode=arch=compute_80,code=sm_80
            -gencode=arch=compute_90,code=[sm_90,compute_90] -o ${fatbin} ${kernels}/codec.cu
    RESULT_VARIABLE failed ERROR_VARIABLE said OUTPUT_VARIABLE said)
  if(failed)
    string(STRIP "${said}" said)
    string(REGEX REPLACE "\n.*" "" said "${said}")
    set(PIPEKERN_KERNELS "compiled at run time by NVRTC: ${PIPEKERN_NVCC} fails (${said})")
  else()
    file(READ ${fatbin} image HEX)
    string(REGEX REPLACE "(..)" "0x\\1," image "${image}")
    execute_process(COMMAND ${PIPEKERN_NVCC} --version OUTPUT_VARIABLE version)
    string(REGEX MATCH "release [0-9.]+" version "${version}")
    set(PIPEKERN_KERNELS "embedded for sm_80, sm_90 and later (nvcc ${version})")
  endif()
else()
  set(PIPEKERN_KERNELS "compiled at run time by NVRTC: there was no nvcc when this was built")
endif()

file(READ ${kernels}/cast.h cast)
file(READ ${kernels}/codec.cu codec)
file(WRITE ${CMAKE_BINARY_DIR}/image.cpp.new
     "#include \"cuda/image.h\"\n"
     "namespace pipekern::cuda {\n"
     "alignas(16) const unsigned char kImage[] = {${image}0};\n"
     "const std::size_t kImageBytes = sizeof kImage - 1;\n"
     "const char* const kCastSource = R\"source(${cast})source\";\n"
     "const char* const kCodecSource = R\"source(${codec})source\";\n"
     "}\n")
configure_file(${CMAKE_BINARY_DIR}/image.cpp.new ${CMAKE_BINARY_DIR}/image.cpp COPYONLY)
message(STATUS "kernels: ${PIPEKERN_KERNELS}")
