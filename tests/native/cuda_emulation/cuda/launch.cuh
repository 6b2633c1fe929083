// The emulation's twin of native/src/cuda/launch.cuh. Of launch() each source has its own, which knows the source's
// name.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "cuda/runtime.h"
#include "work.h"

namespace vptq::cuda {

struct Shape {
  dim3 grid, block;
  size_t shared = 0;
};

template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "allowing a kernel its shared memory");
}

template <class... Parameters, class... Arguments>
static void launch(void (*kernel)(Parameters...), const Shape& shape, Stream stream, const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  const auto with = [&](Parameters... converted) {
    check(emulation::launch({reinterpret_cast<const void*>(kernel), __BASE_FILE__}, shape.grid, shape.block,
                            shape.shared, stream,
                            [kernel, values = std::tuple<Parameters...>(converted...)] { std::apply(kernel, values); }),
          "launching a kernel");
  };
  with(arguments...);
}

}  // namespace vptq::cuda
