# The CUDA backend: a library of its own, loaded when there is a driver, built where there is nvcc.
option(VPTQ_CUDA "Build the CUDA backend if nvcc is found" ON)
# Machine code for compute capability 8.0 (runs on 8.6 and 8.9, too) and 9.0, and PTX for later ones.
set(VPTQ_CUDA_ARCHITECTURES "80-real;90" CACHE STRING "What the CUDA backend is built for")

set(cuda ${src}/cuda)
file(GLOB cuda_kernels CONFIGURE_DEPENDS ${cuda}/kernels/*.cu)
set(cuda_host
  ${cuda}/batches.cpp
  ${cuda}/copy_bandwidth.cpp
  ${cuda}/cuda_backend.cpp
  ${cuda}/memory.cpp
  ${cuda}/runtime.cpp
  ${cuda}/sliced_layers.cpp
  ${cuda}/slices.cpp
  ${cuda}/top_logits_reader.cpp
  ${src}/model/tensor.cpp)

if(VPTQ_CUDA)
  include(CheckLanguage)
  check_language(CUDA)
endif()
if(CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_ARCHITECTURES ${VPTQ_CUDA_ARCHITECTURES})
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # CMake before 3.26 does not know that nvcc 13 takes it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  find_package(CUDAToolkit REQUIRED)
  add_library(vptq_cuda SHARED ${cuda_kernels} ${cuda_host})
  target_include_directories(vptq_cuda PRIVATE native/include ${src} ${CUDAToolkit_INCLUDE_DIRS})
  set_target_properties(vptq_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(vptq_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-missing-field-initializers>
    $<$<AND:$<BOOL:${VPTQ_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>
    $<$<AND:$<BOOL:${VPTQ_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:-Werror=all-warnings>)
  target_link_libraries(vptq_cuda PRIVATE CUDA::cudart_static)
  target_link_options(vptq_cuda PRIVATE -Wl,--no-undefined)
  install(TARGETS vptq_cuda LIBRARY DESTINATION vptq_runtime)
else()
  message(STATUS "No nvcc: the CUDA backend is left out")
endif()

# The same sources as plain C++, for tests on machines without a GPU: VPTQ_CUDA_LIBRARY names the library.
if(VPTQ_TESTS)
  add_subdirectory(tests/native/cuda_emulation)
endif()
