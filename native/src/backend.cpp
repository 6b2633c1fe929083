#include "backend.h"

#include "cpu/cpu_backend.h"
#include "vptq/error.h"

namespace vptq {

std::unique_ptr<Backend> make_backend(const std::string& device, int n_threads) {
  if (device == "auto" || device == "cpu") return std::make_unique<cpu::CpuBackend>(n_threads);
  if (device == "cuda")
    throw UnsupportedError("device: found 'cuda', expected auto or cpu: this build has no CUDA backend");
  throw OptionError("device: found '" + device + "', expected auto, cpu or cuda");
}

}  // namespace vptq
