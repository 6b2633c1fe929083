#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 256;

// Element i of a row of a table (rows, d).
VPTQ_DEVICE float element(const std::byte* table, DType type, int64_t row, int d, int i) {
  if (type == DType::q8_0) {
    const std::byte* block = table + (row * ((d + kQ8Block - 1) / kQ8Block) + i / kQ8Block) * kQ8BlockBytes;
    const float scale = half_to_float(*reinterpret_cast<const uint16_t*>(block));
    return scale * float(reinterpret_cast<const int8_t*>(block + 2)[i % kQ8Block]);
  }
  const int64_t at = row * d + i;
  if (type == DType::f32) return reinterpret_cast<const float*>(table)[at];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(table)[at];
  return type == DType::f16 ? half_to_float(bits) : bf16_to_float(bits);
}

__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int32_t* tokens, const std::byte* table, DType type, int d, float* x) {
  const int t = blockIdx.y, i = int(blockIdx.x) * kThreads + threadIdx.x;
  if (i < d) x[int64_t{t} * d + i] = element(table, type, tokens[t], d, i);
}

}  // namespace

void embed(const DeviceBatch& batch, const Tensor& table, int d, float* x, Stream stream) {
  if (batch.n == 0) return;
  const Shape shape{dim3((d + kThreads - 1) / kThreads, batch.n), dim3(kThreads)};
  launch(embed_kernel, shape, stream, batch.tokens, table.data, table.type, d, x);
}

}  // namespace vptq::cuda
