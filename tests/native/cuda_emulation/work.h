// A stream's work: what launch.cuh asks of cuda_runtime_api.cpp, and that of kernels.cpp.
#pragma once

#include <cstddef>
#include <functional>

#include "cuda_runtime_api.h"

namespace vptq::cuda::emulation {

inline constexpr size_t kSharedBytes = 48 << 10, kSharedBytesOptIn = 227 << 10;

// Notes an error as the thread's last one, and returns it.
cudaError_t result(cudaError_t error);

int capability();  // ten times what it is called
// Whether the current device takes a launch of this shape.
cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);
// Whether an environment variable names the source (rope, of .../rope.cu), or it and the current device (rope:1).
bool is_named(const char* variable, const char* source);

struct Kernel {
  const void* address;
  const char* source;  // the file that launches it
};
// Runs a kernel, or records it, after the checks of its shape that the device makes. `thread` is a thread's share.
// The launches of a source that VPTQ_EMULATED_FAILURE names fail; of one that VPTQ_EMULATED_FAULT names the last block
// of threads does not run.
cudaError_t launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   std::function<void()> thread);

}  // namespace vptq::cuda::emulation
