#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/quantised.cuh"
#include "cuda/kernels/vq.cuh"
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

// A thread has a column, in permuted order, of one token's row.
__global__ void __launch_bounds__(kThreads) embed_vq_kernel(const int32_t* tokens, VqLayer w, float* x) {
  const int t = blockIdx.y, column = int(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= w.in_features) return;
  const VqColumns& c = w.columns[w.n_columns > 1 && column >= w.columns[1].first_column ? 1 : 0];
  const int row = tokens[t], q = (column - c.first_column) / c.group_size, j = (column - c.first_column) % c.group_size;
  const std::byte* indices = c.indices + (int64_t{q} * c.n_blocks + row / c.v) * c.row_bytes;
  const uint32_t value = packed_index(indices, j, c.index_bits + c.res_bits);
  float number[1];
  load_centroid(c.type, c.centroids, (size_t(q) * c.k + (value & index_mask(c.index_bits))) * c.v + row % c.v, number);
  float weight = number[0];
  if (c.r) {
    load_centroid(c.type, c.res_centroids, (size_t(q) * c.r + (value >> c.index_bits)) * c.v + row % c.v, number);
    weight += number[0];
  }
  const int i = w.perm ? w.perm[column] : column;
  if (w.scale) weight = weight * w.scale[i] + w.shift[i];
  if (w.out_scale) weight = weight * w.out_scale[row] + w.out_shift[row];
  x[int64_t{t} * w.in_features + i] = weight;
}

Shape shape_of(const DeviceBatch& batch, int d) {
  return {dim3((d + kThreads - 1) / kThreads, batch.n), dim3(kThreads)};
}

}  // namespace

void embed(const DeviceBatch& batch, const DenseLayer& w, float* x, Stream stream) {
  if (batch.n == 0) return;
  const int d = w.in_features;
  const auto row_bytes = static_cast<int64_t>(bytes_of(w.type, d));
  with_matrix_type(w.type, [&]<DType Type>() {
    launch(embed_kernel<Type>, shape_of(batch, d), stream, batch.tokens, w.weight, row_bytes, d, x);
  });
}

void embed(const DeviceBatch& batch, const VqLayer& w, float* x, Stream stream) {
  if (batch.n == 0) return;
  launch(embed_vq_kernel, shape_of(batch, w.in_features), stream, batch.tokens, w, x);
}

}  // namespace vptq::cuda
