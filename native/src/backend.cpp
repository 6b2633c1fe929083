#include "backend.h"

#include <dlfcn.h>

#include <cstdlib>

#include "cpu/cpu_backend.h"
#include "vptq/error.h"

namespace vptq {
namespace {

constexpr const char* kCudaLibrary = "libvptq_cuda.so";

// The CUDA backend's library lies beside the one that this is part of; VPTQ_CUDA_LIBRARY names another.
std::string cuda_library() {
  if (const char* path = std::getenv("VPTQ_CUDA_LIBRARY")) return path;
  Dl_info here;
  if (!dladdr(reinterpret_cast<const void*>(&cuda_device_count), &here) || !here.dli_fname) return kCudaLibrary;
  const std::string path = here.dli_fname;
  return path.substr(0, path.rfind('/') + 1) + kCudaLibrary;
}

// A function of the CUDA backend's library; the libraries stay loaded.
void* cuda_function(const char* name) {
  if (!std::getenv("VPTQ_CUDA_LIBRARY") && !dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL))
    throw UnsupportedError("device cuda: there is no NVIDIA driver (libcuda.so.1)");
  void* library = dlopen(cuda_library().c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw UnsupportedError(std::string("device cuda: this build has no CUDA backend: ") + dlerror());
  void* function = dlsym(library, name);
  if (!function) throw UnsupportedError("device cuda: " + cuda_library() + " is not this runtime's CUDA backend");
  return function;
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int n_threads) { return std::make_unique<cpu::CpuBackend>(n_threads); }

int cuda_device_count() { return reinterpret_cast<int (*)()>(cuda_function("vptq_cuda_device_count"))(); }

std::unique_ptr<Backend> make_cuda_backend(int device) {
  const auto make = reinterpret_cast<Backend* (*)(int)>(cuda_function("vptq_cuda_backend"));
  return std::unique_ptr<Backend>(make(device));
}

}  // namespace vptq
