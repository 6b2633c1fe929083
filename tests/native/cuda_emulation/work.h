// A stream's work: what launch.cuh asks of cuda_runtime_api.cpp.
#pragma once

#include <cstddef>
#include <functional>

#include "cuda_runtime_api.h"

namespace vptq::cuda::emulation {

// Runs a kernel, or records it, after the checks of its shape that the device makes. `thread` is a thread's share.
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   std::function<void()> thread);

}  // namespace vptq::cuda::emulation
