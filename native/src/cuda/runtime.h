// The CUDA runtime's errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

namespace vptq::cuda {

using Stream = cudaStream_t;

// Throws Error with what CUDA says of it (OutOfMemoryError where that is it); `what` was being done.
void check(cudaError_t error, const char* what);

// Makes a device the calling thread's, as all that is asked of one wants it, and gives back the one before at its end.
// Does not throw: where it fails, what is asked of the device fails.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) noexcept;
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int device_, before_;
};

}  // namespace vptq::cuda
