#include "cuda/runtime.h"

#include <string>

#include "vptq/error.h"

namespace vptq::cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it, if it can be forgotten
  const std::string message = std::string("cuda: ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) throw OutOfMemoryError(message);
  throw DeviceError(message);
}

}  // namespace vptq::cuda
