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

CurrentDevice::CurrentDevice(int device) : device_(device), before_(device) {
  check(cudaGetDevice(&before_), "asking for the current GPU");
  if (device_ != before_) check(cudaSetDevice(device_), "changing to another GPU");
}

CurrentDevice::~CurrentDevice() {
  if (device_ != before_) cudaSetDevice(before_);
}

}  // namespace vptq::cuda
