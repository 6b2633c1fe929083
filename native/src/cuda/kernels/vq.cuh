// What the kernels of vector-quantised layers share: indices, centroids and x as it is multiplied.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace vptq::cuda {

VPTQ_DEVICE uint32_t index_mask(int bits) { return bits == 32 ? ~0u : (1u << bits) - 1; }

// Value j of a row of packed values of at most 32 bits. Read in halves of words: the rows of outliers are aligned to no
// more.
VPTQ_DEVICE uint32_t packed_index(const std::byte* row, int j, int bits) {
  const int64_t bit = static_cast<int64_t>(j) * bits;
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row) + bit / 16;
  const int offset = static_cast<int>(bit % 16);
  uint64_t window = halves[0];
  if (offset + bits > 16) window |= static_cast<uint64_t>(halves[1]) << 16;
  if (offset + bits > 32) window |= static_cast<uint64_t>(halves[2]) << 32;
  return static_cast<uint32_t>(window >> offset) & index_mask(bits);
}

VPTQ_DEVICE float float_from16(DType type, uint32_t bits) {
  return type == DType::bf16 ? bf16_to_float(static_cast<uint16_t>(bits)) : half_to_float(static_cast<uint16_t>(bits));
}

// kCount of a centroid's numbers, from element `first` of a codebook on. kCount divides the length of the centroids,
// which are aligned to their own size: the loads are as wide as that allows.
template <int kCount>
VPTQ_DEVICE void load_centroid(DType type, const std::byte* codebook, size_t first, float (&w)[kCount]) {
  if (type == DType::f32) {
    const float* p = reinterpret_cast<const float*>(codebook) + first;
    for (int i = 0; i < kCount; ++i) w[i] = p[i];
    return;
  }
  const uint16_t* p = reinterpret_cast<const uint16_t*>(codebook) + first;
  if constexpr (kCount % 8 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 8) {
      const uint4 bits = *reinterpret_cast<const uint4*>(p + i);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) w[i + j] = float_from16(type, words[j / 2] >> (j % 2 * 16));
    }
  } else if constexpr (kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(p + i);
      w[i] = float_from16(type, bits);
      w[i + 1] = float_from16(type, bits >> 16);
    }
  } else {
    for (int i = 0; i < kCount; ++i) w[i] = float_from16(type, p[i]);
  }
}

// The columns [first, first + count) of the activations of up to kTokens tokens, x (n, in_features), shared out to the
// block's threads: store(j, i, scale, xs) for column first + j, which is input feature i. Of the tokens past n, xs is
// 0. A feature's number is waited for before its x is: so a thread asks for a few at a time.
template <int kTokens, class Store>
VPTQ_DEVICE void load_columns(const VqLayer& w, int first, int count, const float* x, int n, Store store) {
  constexpr int kAtOnce = kTokens > 2 ? 2 : 4;
  const int n_threads = static_cast<int>(blockDim.x);
  for (int begin = static_cast<int>(threadIdx.x); begin < count; begin += kAtOnce * n_threads) {
    int input[kAtOnce];
    float scale[kAtOnce], xs[kAtOnce][kTokens];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int j = begin + u * n_threads;
      input[u] = j < count ? (w.perm ? w.perm[first + j] : first + j) : 0;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      scale[u] = w.scale ? w.scale[input[u]] : 1.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) xs[u][t] = t < n ? x[static_cast<int64_t>(t) * w.in_features + input[u]] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (begin + u * n_threads < count) store(begin + u * n_threads, input[u], scale[u], xs[u]);
  }
}

// Offsets are what the shifts add to every output of a token: sum_i x_i shift_i, or with norms per output sum_i x_i,
// which out_shift multiplies. All products are fused by name: a compiler's choice could differ between two kernels.
VPTQ_DEVICE bool has_offset(const VqLayer& w) { return w.shift || w.out_shift; }
VPTQ_DEVICE float add_to_offset(const VqLayer& w, int i, float x, float offset) {
  return fmaf(x, w.shift ? w.shift[i] : 1.0f, offset);
}

// An output from its sum over the columns.
VPTQ_DEVICE float finish_output(const VqLayer& w, int row, float sum, float offset) {
  if (w.shift) sum += offset;
  if (w.out_scale) sum = fmaf(sum, w.out_scale[row], offset * w.out_shift[row]);
  return w.bias ? sum + w.bias[row] : sum;
}

}  // namespace vptq::cuda
