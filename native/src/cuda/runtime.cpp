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

CurrentDevice::CurrentDevice(int device) noexcept : device_(device), before_(device) {
  cudaGetDevice(&before_);
  if (device_ != before_) cudaSetDevice(device_);
}

CurrentDevice::~CurrentDevice() {
  if (device_ != before_) cudaSetDevice(before_);
}

}  // namespace vptq::cuda
