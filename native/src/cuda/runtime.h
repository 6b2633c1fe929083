// The CUDA runtime's errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

namespace vptq::cuda {

using Stream = cudaStream_t;

// Throws Error with what CUDA says of it (OutOfMemoryError where that is it); `what` was being done.
void check(cudaError_t error, const char* what);

}  // namespace vptq::cuda
