// Launches as calls. The emulation has its own twin of this file.
#pragma once

#include <cstddef>

#include "cuda/runtime.h"

namespace vptq::cuda {

struct Shape {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory; more than 48 KiB after allow_shared()
};

// Lets a kernel have so many bytes of dynamic shared memory on the current device. Always the same number for a kernel:
// it holds for other threads' launches, and for recorded ones.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "allowing a kernel its shared memory");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, Stream stream, const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  const auto with = [&](Parameters... converted) {
    void* pointers[] = {static_cast<void*>(&converted)...};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), shape.grid, shape.block, pointers, shape.shared,
                           stream),
          "launching a kernel");
  };
  with(arguments...);
}

}  // namespace vptq::cuda
