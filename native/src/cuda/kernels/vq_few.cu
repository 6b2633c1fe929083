// A vector-quantised matrix times the activations of up to eight tokens, the plain way: indices as in the file,
// centroids gathered from global memory. Each lookup moves a 32-byte sector out of L2, which bounds it. The reference
// of the other kernels.
//
// A block has kRows rows of one layer, its threads share the columns: thread i has the columns c with c % kThreads = i,
// in ascending order whatever the number of tokens, so that a token's sums are the same in any batch.
#include <algorithm>
#include <numeric>

#include "cuda/kernels/vq.cuh"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStaged = 8192;  // floats of x in shared memory: kStaged / kTokens columns at a time

struct Uses {
  VqUse use[kMaxUses];
};

// Adds the columns [begin, end) of group q to the sums of the rows from `row` on. x (kTokens, kStaged / kTokens), from
// column x_column on.
template <int kRows, int kTokens>
VPTQ_DEVICE void add_columns(const VqColumns& c, int q, int begin, int end, int row, const float* x, int x_column,
                             float (&sums)[kTokens][kRows]) {
  const int bits = c.index_bits + c.res_bits;
  const int block = row / c.v, first_row = row % c.v;
  const int first_column = c.first_column + q * c.group_size;
  const std::byte* indices = c.indices + (static_cast<int64_t>(q) * c.n_blocks + block) * c.row_bytes;
  const int thread = static_cast<int>(threadIdx.x);
  for (int column = begin + ((thread - begin) & (kThreads - 1)); column < end; column += kThreads) {
    const uint32_t value = packed_index(indices, column - first_column, bits);
    const size_t index = static_cast<size_t>(q) * c.k + (value & index_mask(c.index_bits));
    float w[kRows];
    load_centroid(c.type, c.centroids, index * c.v + first_row, w);
    if (c.r) {
      const size_t res_index = static_cast<size_t>(q) * c.r + (value >> c.index_bits);
      float residual[kRows];
      load_centroid(c.type, c.res_centroids, res_index * c.v + first_row, residual);
      for (int i = 0; i < kRows; ++i) w[i] += residual[i];
    }
    for (int t = 0; t < kTokens; ++t) {
      const float xt = x[t * (kStaged / kTokens) + column - x_column];
      for (int i = 0; i < kRows; ++i) sums[t][i] = fmaf(w[i], xt, sums[t][i]);
    }
  }
}

// x (n, in_features) with n <= kTokens; kRows divides the vector lengths of all columns.
template <int kRows, int kTokens>
__global__ void __launch_bounds__(kThreads) vq_few_kernel(Uses uses, const float* __restrict__ x, int n) {
  constexpr int kColumns = kStaged / kTokens;
  __shared__ float staged[kStaged];
  __shared__ float partial[kWarps][kTokens][kRows + 1];  // and the offsets
  const VqLayer& w = uses.use[blockIdx.y].layer;
  const int row = static_cast<int>(blockIdx.x) * kRows, thread = static_cast<int>(threadIdx.x);
  if (row >= w.out_features) return;

  float sums[kTokens][kRows] = {}, offsets[kTokens] = {};
  for (int begin = 0; begin < w.in_features; begin += kColumns) {
    const int end = begin + kColumns < w.in_features ? begin + kColumns : w.in_features;
    sync_block();
    load_columns<kTokens>(w, begin, end - begin, x, n, [&](int j, int i, float scale, const float (&xs)[kTokens]) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        staged[t * kColumns + j] = xs[t] * scale;
        if (has_offset(w)) offsets[t] = add_to_offset(w, i, xs[t], offsets[t]);
      }
    });
    sync_block();
    for (int part = 0; part < w.n_columns; ++part) {
      const VqColumns& c = w.columns[part];
      for (int q = 0; q < c.n_groups; ++q) {
        const int first = c.first_column + q * c.group_size;
        const int from = first > begin ? first : begin;
        const int to = first + c.group_size < end ? first + c.group_size : end;
        add_columns<kRows, kTokens>(c, q, from, to, row, staged, begin, sums);
      }
    }
  }

  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < kRows; ++i) sums[t][i] += shuffle_xor(sums[t][i], mask);
      offsets[t] += shuffle_xor(offsets[t], mask);
    }
  if (thread % kWarp == 0)
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < kRows; ++i) partial[thread / kWarp][t][i] = sums[t][i];
      partial[thread / kWarp][t][kRows] = offsets[t];
    }
  sync_block();
  const int t = thread / kRows, i = thread % kRows;
  if (t >= n || row + i >= w.out_features) return;
  float sum = 0, offset = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    sum += partial[warp][t][i];
    offset += partial[warp][t][kRows];
  }
  uses.use[blockIdx.y].y[static_cast<int64_t>(t) * w.out_features + row + i] = finish_output(w, row + i, sum, offset);
}

template <int kRows>
void launch_rows(const Uses& uses, int n_uses, int out_features, const float* x, int n, Stream stream) {
  const Shape shape{dim3((out_features + kRows - 1) / kRows, n_uses), dim3(kThreads)};
  if (n == 1)
    launch(vq_few_kernel<kRows, 1>, shape, stream, uses, x, n);
  else
    launch(vq_few_kernel<kRows, kFewTokens>, shape, stream, uses, x, n);
}

void launch_uses(const Uses& uses, int n_uses, const float* x, int n, Stream stream) {
  int rows = 0, out_features = 0;  // the largest number of rows that divides all vectors
  for (int u = 0; u < n_uses; ++u) {
    const VqLayer& w = uses.use[u].layer;
    for (int part = 0; part < w.n_columns; ++part) rows = std::gcd(rows, w.columns[part].v);
    out_features = std::max(out_features, w.out_features);
  }
  if (rows % 16 == 0) return launch_rows<16>(uses, n_uses, out_features, x, n, stream);
  if (rows % 12 == 0) return launch_rows<12>(uses, n_uses, out_features, x, n, stream);
  if (rows % 8 == 0) return launch_rows<8>(uses, n_uses, out_features, x, n, stream);
  if (rows % 6 == 0) return launch_rows<6>(uses, n_uses, out_features, x, n, stream);
  if (rows % 4 == 0) return launch_rows<4>(uses, n_uses, out_features, x, n, stream);
  if (rows % 2 == 0) return launch_rows<2>(uses, n_uses, out_features, x, n, stream);
  launch_rows<1>(uses, n_uses, out_features, x, n, stream);
}

}  // namespace

void vq_few(const VqUse* uses, int n_uses, const float* x, int n, Stream stream) {
  Uses few{};
  std::copy_n(uses, n_uses, few.use);
  for (int first = 0; first < n; first += kFewTokens) {
    launch_uses(few, n_uses, x + static_cast<int64_t>(first) * uses->layer.in_features, std::min(n - first, kFewTokens),
                stream);
    for (int u = 0; u < n_uses; ++u) few.use[u].y += static_cast<int64_t>(kFewTokens) * few.use[u].layer.out_features;
  }
}

}  // namespace vptq::cuda
