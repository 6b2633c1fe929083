#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/quantised.cuh"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 256;

// Element i of a row.
template <DType Type>
VPTQ_DEVICE float element(const std::byte* row, int i) {
  if constexpr (Type == DType::f32) return reinterpret_cast<const float*>(row)[i];
  if constexpr (Type == DType::f16) return half_to_float(reinterpret_cast<const uint16_t*>(row)[i]);
  if constexpr (Type == DType::bf16) return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[i]);
  if constexpr (Type == DType::q8_0) {
    const std::byte* block = row + int64_t{i} / kQ8Block * kQ8BlockBytes;
    const float scale = half_to_float(*reinterpret_cast<const uint16_t*>(block));
    return scale * float(reinterpret_cast<const int8_t*>(block + 2)[i % kQ8Block]);
  }
  if constexpr (kBits<Type> == 4 || kBits<Type> == 5) return packed_weight<Type>(row, i);
}

template <DType Type>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int32_t* tokens, const std::byte* table, int64_t row_bytes, int d, float* x) {
  const int t = blockIdx.y, i = int(blockIdx.x) * kThreads + threadIdx.x;
  if (i < d) x[int64_t{t} * d + i] = element<Type>(table + tokens[t] * row_bytes, i);
}

}  // namespace

void embed(const DeviceBatch& batch, const Tensor& table, int d, float* x, Stream stream) {
  if (batch.n == 0) return;
  const Shape shape{dim3((d + kThreads - 1) / kThreads, batch.n), dim3(kThreads)};
  const auto row_bytes = static_cast<int64_t>(bytes_of(table.type, d));
  with_matrix_type(table.type, [&]<DType Type>() {
    launch(embed_kernel<Type>, shape, stream, batch.tokens, table.data, row_bytes, d, x);
  });
}

}  // namespace vptq::cuda
