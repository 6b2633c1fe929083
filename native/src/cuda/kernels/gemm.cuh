// Products with the activations of many tokens: f16 on the tensor cores, float32 sums. The weights of a tile are made
// in shared memory from what is stored of them; vq_many.cu and dense_many.cu say how.
//
// A token's sums run over the columns in steps of 16 from the first to the last, whatever its place in a tile and the
// shape of that: one instruction adds 16 products to each sum.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/vq.cuh"
#include "cuda/launch.cuh"

namespace vptq::cuda {

inline constexpr int kStepColumns = 32;  // whose weights are in shared memory at a time
inline constexpr int kXStages = 3;       // of x in shared memory: one in use, two on their way
inline constexpr int kWStages = 2;       // of weights: one in use, one being made
inline constexpr int kMostTokens = 256;  // of a tile: the workspace has rows for all of them
// Elements between the rows of x, and of weights by rows: 80 bytes, so that eight rows lie in different banks.
inline constexpr int kStepStride = kStepColumns + 8;

// Weights that are not stored in f16 are multiplied by this on their way to it, so that small ones keep their bits:
// those from 2.4e-7 on are normal numbers then. 256 and more become infinite, and show.
inline constexpr float kWeightFactor = 256;

// What a block computes, and a warp of it. Warps come in fours: each has eight columns of a step to look up.
template <int kOutputs_, int kTokens_, int kWarpOutputs_, int kWarpTokens_, int kBlocks_>
struct Tile {
  static constexpr int kOutputs = kOutputs_, kTokens = kTokens_;
  static constexpr int kWarpOutputs = kWarpOutputs_, kWarpTokens = kWarpTokens_;
  static constexpr int kBlocks = kBlocks_;  // that a multiprocessor has registers for
  static constexpr int kWarps = kOutputs / kWarpOutputs * (kTokens / kWarpTokens);
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kXElements = kTokens * kStepStride;  // of a stage
  static_assert(kWarps % 4 == 0 && kMostTokens % kTokens == 0);
};
// On an H200 the tensor cores do 128 x 256 x 32 products in some 830 cycles (mma.sync reaches about 600 TFLOP/s). A
// large tile makes its 4096 weights in that time: 512 lookups of eight, 16 KB of sectors at 64 bytes a cycle from L2. A
// block of 256 threads fills a multiprocessor's registers with sums. The others are for products that have too few of
// the large ones to keep the device busy: a medium tile makes twice as many weights a product, a small one also copies
// x twice as often.
using LargeTile = Tile<128, 256, 64, 64, 1>;
using MediumTile = Tile<64, 128, 32, 64, 3>;
using SmallTile = Tile<32, 128, 32, 32, 4>;

// x as the products take it, in a workspace.
struct HalfActivations {
  // (n, stride) f16: in the order of the columns, scaled, times a power of two of each token. Up to a multiple of
  // kMostTokens there are more rows, of anything.
  uint16_t* x;
  float* inverse;   // (n) of that power of two
  float* offset;    // (n) as add_to_offset() has it
  int n, stride;    // stride: a multiple of kStepColumns
  int main_column;  // where the columns after the outliers begin; zeros before and at the end
};
HalfActivations prepare_activations(const VqLayer& layer, const float* x, int n, void* workspace, Stream stream);

// One run over columns: the first column's x, and what becomes of the sums.
struct Product {
  HalfActivations x;
  int first_column, n_columns;
  VqLayer layer;  // for finish_output()
  float weight_inverse;
  bool accumulate;  // y holds sums of other columns
  bool finish;      // these columns are the last
  float* y;
};

VPTQ_DEVICE int lesser(int a, int b) { return a < b ? a : b; }

// Sums of a warp: fragments as mma_f16() has them.
template <class T>
using Sums = float[T::kWarpOutputs / 16][T::kWarpTokens / 8][4];

// use(sum, output, token) for each sum of this lane.
template <class T, class Use>
VPTQ_DEVICE void for_each_sum(Sums<T>& sums, int output, int token, int lane, Use use) {
#pragma unroll
  for (int i = 0; i < T::kWarpOutputs / 16; ++i)
#pragma unroll
    for (int j = 0; j < T::kWarpTokens / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        use(sums[i][j][e], output + 16 * i + lane / 4 + e / 2 * 8, token + 8 * j + lane % 4 * 2 + e % 2);
}

// A step's products: w and x of the block's tile, from the warp's first output and token on.
template <class T, class Weights>
VPTQ_DEVICE void multiply_step(const uint16_t* w, const uint16_t* x, int lane, Sums<T>& sums) {
  const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;  // which row of which matrix to point at
#pragma unroll
  for (int k = 0; k < kStepColumns; k += 16) {
    uint32_t a[T::kWarpOutputs / 16][4], b[T::kWarpTokens / 8][2];
#pragma unroll
    for (int i = 0; i < T::kWarpOutputs / 16; ++i) {
      if constexpr (Weights::kColumnMajor)
        load_matrices_transposed(a[i], w + (k + high + low) * Weights::kStride + 16 * i + middle);
      else
        load_matrices(a[i], w + (16 * i + middle + low) * Weights::kStride + k + high);
    }
#pragma unroll
    for (int j = 0; j < T::kWarpTokens / 8; j += 2) {
      uint32_t two[4];
      load_matrices(two, x + (8 * j + high + low) * kStepStride + k + middle);
      b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
    }
#pragma unroll
    for (int i = 0; i < T::kWarpOutputs / 16; ++i)
#pragma unroll
      for (int j = 0; j < T::kWarpTokens / 8; ++j) mma_f16(sums[i][j], a[i], b[j]);
  }
}

// The block's tile. Weights makes its part of the weights step by step, in three stages, each of which waits for the
// one before while products are computed: ask(), fetch(), put(shared memory). fetch() goes on to the next step.
template <class T, class Weights>
VPTQ_DEVICE void multiply(Weights& weights, const Product& p, int first_output, int first_token) {
  auto* x_stages = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* w_stages = x_stages + kXStages * T::kXElements;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int warp_output = warp % (T::kOutputs / T::kWarpOutputs) * T::kWarpOutputs;
  const int warp_token = warp / (T::kOutputs / T::kWarpOutputs) * T::kWarpTokens;
  const int n_steps = (p.n_columns + kStepColumns - 1) / kStepColumns;

  constexpr int kPieces = kStepColumns / 8;  // of 16 bytes, in a token's step
  constexpr int kTokensApart = T::kThreads / kPieces;
  const int token = thread / kPieces, piece = thread % kPieces * 8;
  const uint16_t* next_x = p.x.x + int64_t{first_token + token} * p.x.stride + p.first_column + piece;
  const auto copy_x = [&](int step, int stage) {
    if (step < n_steps)
#pragma unroll
      for (int i = 0; i < T::kTokens / kTokensApart; ++i)
        copy_async(x_stages + stage * T::kXElements + (token + i * kTokensApart) * kStepStride + piece,
                   next_x + int64_t{i * kTokensApart} * p.x.stride);
    next_x += kStepColumns;
    commit_copies();
  };

  Sums<T> sums = {};
  if (p.accumulate)
    for_each_sum<T>(sums, first_output + warp_output, first_token + warp_token, lane, [&](float& sum, int o, int t) {
      if (o < p.layer.out_features && t < p.x.n) sum = p.y[int64_t{t} * p.layer.out_features + o];
    });
  for (int step = 0; step < kXStages - 1; ++step) copy_x(step, step);
  weights.ask();
  weights.fetch();
  weights.ask();
  int x_stage = 0, w_stage = 0;
#pragma unroll 1
  for (int step = 0; step < n_steps; ++step) {
    // The weights come first in the loop, not last: the compiler would have them wait for memory before the products.
    weights.put(w_stages + w_stage * Weights::kElements);
    wait_copies<kXStages - 2>();
    sync_block();  // this step's x and weights are there, and all have done with the stages of the step before
    copy_x(step + kXStages - 1, x_stage == 0 ? kXStages - 1 : x_stage - 1);
    weights.fetch();  // of the next step, and the indices of the one after it; past the end: of any
    weights.ask();
    multiply_step<T, Weights>(
        w_stages + w_stage * Weights::kElements + warp_output * (Weights::kColumnMajor ? 1 : Weights::kStride),
        x_stages + x_stage * T::kXElements + warp_token * kStepStride, lane, sums);
    x_stage = x_stage == kXStages - 1 ? 0 : x_stage + 1;
    w_stage ^= 1;
  }

  for_each_sum<T>(sums, first_output + warp_output, first_token + warp_token, lane, [&](float sum, int o, int t) {
    if (o >= p.layer.out_features || t >= p.x.n) return;
    if (p.finish) sum = finish_output(p.layer, o, sum * p.weight_inverse * p.x.inverse[t], p.x.offset[t]);
    p.y[int64_t{t} * p.layer.out_features + o] = sum;
  });
}

// Weights: made of Source, for the tile's outputs from first_output on. Tiles of the same weights follow each other.
template <class T, class Weights>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) gemm_kernel(typename Weights::Source source, Product p) {
  const int token_tiles = (p.x.n + T::kTokens - 1) / T::kTokens;
  const int first_output = static_cast<int>(blockIdx.x / token_tiles) * T::kOutputs;
  Weights weights(source, p.layer.out_features, first_output);
  multiply<T>(weights, p, first_output, static_cast<int>(blockIdx.x % token_tiles) * T::kTokens);
}

template <class T>
int64_t count_tiles(const Product& p) {
  return int64_t{(p.layer.out_features + T::kOutputs - 1) / T::kOutputs} * ((p.x.n + T::kTokens - 1) / T::kTokens);
}

// Whether there are tiles for most multiprocessors, and no more than half of their tokens are missing.
template <class T>
bool suits(const Product& p) {
  return count_tiles<T>(p) >= 100 && 2 * p.x.n > T::kTokens;
}

template <class T, class Weights>
void gemm(const typename Weights::Source& source, const Product& p, Stream stream) {
  constexpr size_t kShared = (kXStages * T::kXElements + kWStages * Weights::kElements) * sizeof(uint16_t);
  static_assert(kShared <= kLeastShared);
  allow_shared(gemm_kernel<T, Weights>, kShared);
  launch(gemm_kernel<T, Weights>, {dim3(static_cast<unsigned>(count_tiles<T>(p))), dim3(T::kThreads), kShared}, stream,
         source, p);
}

}  // namespace vptq::cuda
