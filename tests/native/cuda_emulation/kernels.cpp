// What the CUDA runtime knows of a kernel, and the checks of a launch's shape that the device makes.
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>
#include <utility>

#include "cuda_runtime_api.h"
#include "work.h"

namespace vptq::cuda::emulation {

namespace {

std::mutex mutex;
std::map<std::pair<int, const void*>, size_t> allowed_shared;  // by device and kernel; guarded by `mutex`

std::pair<int, const void*> on_device(const void* kernel) {
  int device = 0;
  cudaGetDevice(&device);
  return {device, kernel};
}

}  // namespace

int capability() {
  const char* text = std::getenv("VPTQ_EMULATED_CAPABILITY");
  return text ? std::atoi(text) : 90;
}

cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const uint64_t n_threads = uint64_t{block.x} * block.y * block.z;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || n_threads < 1 || n_threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const std::lock_guard lock(mutex);
  const auto allowed = allowed_shared.find(on_device(kernel));
  const size_t most = allowed == allowed_shared.end() ? kSharedBytes : allowed->second;
  return shared_bytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

bool is_named(const char* variable, const char* source) {
  const char* text = std::getenv(variable);
  if (!text) return false;
  const std::string_view named = text, path = source;
  const size_t colon = named.find(':'), first = path.rfind('/') + 1;
  if (named.substr(0, colon) != path.substr(first, path.rfind('.') - first)) return false;
  return colon == named.npos || std::atoi(text + colon + 1) == on_device(nullptr).first;
}

}  // namespace vptq::cuda::emulation

using namespace vptq::cuda::emulation;

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0) return result(cudaErrorInvalidValue);
  const auto bytes = static_cast<size_t>(value);
  const std::lock_guard lock(mutex);
  size_t& allowed = allowed_shared[on_device(kernel)];
  if (bytes > kSharedBytesOptIn || bytes < allowed) return result(cudaErrorInvalidValue);
  allowed = bytes;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return result(capability() < 80 ? cudaErrorNoKernelImageForDevice : cudaSuccess);
}
