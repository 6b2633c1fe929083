// What the GPU's memory gives: the rate that kernels' bytes are compared with.
#pragma once

#include <cstddef>

#include "cuda/runtime.h"

namespace vptq::cuda {

// Bytes read and written a second by copies of 1 GiB, or max_bytes where that is less; the median of several.
double copy_bandwidth(Stream stream, size_t max_bytes);

}  // namespace vptq::cuda
