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
  if (!dladdr(reinterpret_cast<const void*>(&make_cuda_backend), &here) || !here.dli_fname) return kCudaLibrary;
  const std::string path = here.dli_fname;
  return path.substr(0, path.rfind('/') + 1) + kCudaLibrary;
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int n_threads) { return std::make_unique<cpu::CpuBackend>(n_threads); }

// The libraries stay loaded.
std::unique_ptr<Backend> make_cuda_backend() {
  if (!std::getenv("VPTQ_CUDA_LIBRARY") && !dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL))
    throw UnsupportedError("device cuda: there is no NVIDIA driver (libcuda.so.1)");
  void* library = dlopen(cuda_library().c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw UnsupportedError(std::string("device cuda: this build has no CUDA backend: ") + dlerror());
  const auto make = reinterpret_cast<Backend* (*)()>(dlsym(library, "vptq_cuda_backend"));
  if (!make) throw UnsupportedError("device cuda: " + cuda_library() + " is not this runtime's CUDA backend");
  return std::unique_ptr<Backend>(make());
}

}  // namespace vptq
