// Attention of single tokens in float32, split over positions ("flash decoding", Dao et al. 2023). A token's keys and
// values are read once for up to 8 of the query heads that share them, 16 bytes at a time; that is the bound: 16 KiB of
// an f16 cache with head_dim 128 for 32 positions, 860 cycles of an SM's share of an H200's bandwidth.
//
// A row (the key or value of a position) lies over the lanes of a part of a warp, 16 elements a lane. Each such part
// takes positions of its own and keeps its own sums, relative to the largest score that it has seen; these are brought
// together at the end: within the warp, among the warps, and, by a second kernel, among the splits.
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/attention.cuh"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr float kInfinity = __builtin_huge_valf();

constexpr int kWarps = 4;      // that share positions
constexpr int kMostTeams = 2;  // of kWarps, each with query heads of its own: what one has read, the other finds in L1
constexpr int kElements = 16;  // of a row, in a lane
constexpr int kRows = 2;       // that a lane loads at once
constexpr int kCombineThreads = 64;

struct Positions {
  int begin, end;
};

// What of [first, position] a split sees: whole blocks of the cache, as many as any other.
VPTQ_DEVICE Positions positions_of_split(int first, int position, int split, int n_splits) {
  const int first_block = first / kBlockTokens, n_blocks = position / kBlockTokens + 1 - first_block;
  const int blocks = (n_blocks + n_splits - 1) / n_splits;
  const int begin = (first_block + split * blocks) * kBlockTokens, end = begin + blocks * kBlockTokens;
  return {begin > first ? begin : first, end < position + 1 ? end : position + 1};
}

// A head's sums over some positions: of values, weighted by e^(score - largest), and of these weights.
// A NaN among the scores does not become the largest, but the total.
struct Sums {
  float largest, total;

  // What the weights so far have to be multiplied by where there is now a larger score.
  static VPTQ_DEVICE float keep(float before, float largest) {
    return before == largest ? 1.0f : exp_fast(before - largest);
  }
};

// The elements of a row that a lane has, as floats: chunk j begins at element (j * kLanes + lane) * kChunk.
template <DType type, int kLanes>
struct RowPart {
  using Format = KvFormat<type>;
  static constexpr int kChunk = Format::kChunk, kChunks = kElements / kChunk;
  typename Format::Chunk chunks[kChunks];

  static VPTQ_DEVICE int element(int chunk, int lane) { return (chunk * kLanes + lane) * kChunk; }

  VPTQ_DEVICE void load(const std::byte* head, int head_dim, int token, int lane) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) chunks[j] = Format::load(head, head_dim, token, element(j, lane));
  }
  VPTQ_DEVICE void to_floats(float (&x)[kElements]) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float part[kChunk];
      Format::to_floats(chunks[j], part);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[j * kChunk + i] = part[i];
    }
  }
};

// The sums of a split, over kWidth >= head_dim elements, for up to kHeads query heads a team.
// Partial sums (n, n_head, n_splits) of (head_dim + 2): largest, total, values.
template <DType type, int kWidth, int kHeads>
__global__ void __launch_bounds__(kMostTeams * kWarps * kWarp)
    attention_few_kernel(AttentionUse use, int n_splits, float* partials) {
  constexpr int kLanes = kWidth / kElements;                                // of a row
  constexpr int kWarpRows = kWarp / kLanes;                                 // that a warp loads at once
  constexpr int kWarpStep = kWarpRows * kRows, kStep = kWarps * kWarpStep;  // positions
  using Part = RowPart<type, kLanes>;
  __shared__ Sums warp_sums[kMostTeams][kWarps][kHeads];
  __shared__ float warp_values[kMostTeams][kWarps][kHeads][kWidth];

  const int lane = threadIdx.x % kLanes, row = threadIdx.x % kWarp / kLanes, warp = threadIdx.x / kWarp % kWarps;
  const int team = threadIdx.x / (kWarps * kWarp), n_teams = blockDim.x / (kWarps * kWarp);
  const int token = use.first_token + int(blockIdx.z), split = blockIdx.x, head_dim = use.kv.head_dim;
  const int kv_head = int(blockIdx.y) % use.kv.n_head_kv, per_kv = use.heads_per_kv();
  const int first_head = (int(blockIdx.y) / use.kv.n_head_kv * n_teams + team) * kHeads;  // of those of the kv head
  const int position = use.batch.positions[token], sequence = use.batch.sequences[token];
  const Positions seen = positions_of_split(use.first_seen(position), position, split, n_splits);
  if (seen.begin >= seen.end) return;

  const int64_t q_row = int64_t{token} * use.n_head + kv_head * per_kv + first_head;
  float q[kHeads][kElements], values[kHeads][kElements];
  Sums sums[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    sums[h] = {-kInfinity, 0};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int d = Part::element(i / Part::kChunk, lane) + i % Part::kChunk;
      q[h][i] = first_head + h < per_kv && d < head_dim ? use.q[(q_row + h) * head_dim + d] * use.scale : 0.0f;
      values[h][i] = 0;
    }
  }

  const auto load = [&](Part(&parts)[kRows], size_t offset, int p) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int at = p + r * kWarpRows + row;
      parts[r] = {};
      if (at < seen.end)
        parts[r].load(block_of(use.batch, sequence, at) + offset + kv_head * use.kv.head_bytes, head_dim,
                      at % kBlockTokens, lane);
    }
  };

  Part key_parts[kRows], value_parts[kRows];
  int p = seen.begin + warp * kWarpStep;
  load(key_parts, use.kv.keys, p);
  for (; p < seen.end; p += kStep) {
    load(value_parts, use.kv.values, p);
    float weights[kRows][kHeads];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float key[kElements];
      key_parts[r].to_floats(key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < kElements; ++i) score = fmaf(q[h][i], key[i], score);
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) score += shuffle_xor(score, mask);
        weights[r][h] = score;
      }
    }
    load(key_parts, use.kv.keys, p + kStep);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float largest = sums[h].largest;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (p + r * kWarpRows + row < seen.end) largest = fmaxf(largest, weights[r][h]);
      if (largest != sums[h].largest) {
        const float keep = Sums::keep(sums[h].largest, largest);
        sums[h] = {largest, sums[h].total * keep};
#pragma unroll
        for (int i = 0; i < kElements; ++i) values[h][i] *= keep;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        weights[r][h] = p + r * kWarpRows + row < seen.end ? exp_fast(weights[r][h] - largest) : 0.0f;
        sums[h].total += weights[r][h];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float value[kElements];
      value_parts[r].to_floats(value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
#pragma unroll
        for (int i = 0; i < kElements; ++i) values[h][i] = fmaf(weights[r][h], value[i], values[h][i]);
    }
  }

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int mask = kLanes; mask < kWarp; mask *= 2) {
      const float other = shuffle_xor(sums[h].largest, mask), largest = fmaxf(sums[h].largest, other);
      const float keep = Sums::keep(sums[h].largest, largest), share = Sums::keep(other, largest);
      sums[h] = {largest, sums[h].total * keep + shuffle_xor(sums[h].total, mask) * share};
#pragma unroll
      for (int i = 0; i < kElements; ++i) values[h][i] = values[h][i] * keep + shuffle_xor(values[h][i], mask) * share;
    }
    if (row == 0) {
      if (lane == 0) warp_sums[team][warp][h] = sums[h];
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        warp_values[team][warp][h][Part::element(i / Part::kChunk, lane) + i % Part::kChunk] = values[h][i];
    }
  }
  sync_block();

  for (int h = 0; h < kHeads && first_head + h < per_kv; ++h) {
    float largest = -kInfinity, total = 0, shares[kWarps];
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, warp_sums[team][w][h].largest);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      shares[w] = Sums::keep(warp_sums[team][w][h].largest, largest);
      total += warp_sums[team][w][h].total * shares[w];
    }
    const int64_t out_row = int64_t{blockIdx.z} * use.n_head + kv_head * per_kv + first_head + h;
    float* partial = partials + (out_row * n_splits + split) * (head_dim + 2);
    const int thread = threadIdx.x % (kWarps * kWarp);
    if (thread == 0) {
      partial[0] = largest;
      partial[1] = total;
    }
    for (int d = thread; d < head_dim; d += kWarps * kWarp) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum = fmaf(warp_values[team][w][h][d], shares[w], sum);
      partial[2 + d] = sum;
    }
  }
}

// Adds up a token's and head's partial sums, those of the splits that see something.
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(AttentionUse use, int n_splits, const float* partials) {
  __shared__ float shares[kMostSplits];
  const int token = use.first_token + int(blockIdx.y), head_dim = use.kv.head_dim, size = head_dim + 2;
  partials += (int64_t{blockIdx.y} * use.n_head + blockIdx.x) * n_splits * size;
  const int position = use.batch.positions[token], first = use.first_seen(position);
  int n = 0;
  for (; n < n_splits; ++n) {
    const Positions seen = positions_of_split(first, position, n, n_splits);
    if (seen.begin >= seen.end) break;
  }
  float largest = -kInfinity, total = 0;
#pragma unroll 8
  for (int s = 0; s < n; ++s) largest = fmaxf(largest, partials[s * size]);
  for (int s = threadIdx.x; s < n; s += kCombineThreads) shares[s] = Sums::keep(partials[s * size], largest);
  sync_block();
#pragma unroll 8
  for (int s = 0; s < n; ++s) total += partials[s * size + 1] * shares[s];
  for (int d = threadIdx.x; d < head_dim; d += kCombineThreads) {
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < n; ++s) sum = fmaf(partials[s * size + 2 + d], shares[s], sum);
    use.out[(int64_t{token} * use.n_head + blockIdx.x) * head_dim + d] = sum / total;
  }
}

template <DType type, int kWidth, int kHeads>
void attention_few_as(const AttentionUse& use, int n, int n_splits, float* workspace, Stream stream) {
  const int n_parts = (use.n_head / use.kv.n_head_kv + kHeads - 1) / kHeads, n_teams = n_parts > 1 ? kMostTeams : 1;
  const Shape shape{dim3(n_splits, (n_parts + n_teams - 1) / n_teams * use.kv.n_head_kv, n),
                    dim3(n_teams * kWarps * kWarp)};
  launch(attention_few_kernel<type, kWidth, kHeads>, shape, stream, use, n_splits, workspace);
}

template <DType type, int kWidth>
void attention_few_as(const AttentionUse& use, int n, int n_splits, float* workspace, Stream stream) {
  const auto run =
      use.n_head == use.kv.n_head_kv ? attention_few_as<type, kWidth, 1> : attention_few_as<type, kWidth, 4>;
  run(use, n, n_splits, workspace, stream);
}

template <DType type>
void attention_few_as(const AttentionUse& use, int n, int n_splits, float* workspace, Stream stream) {
  const auto run = use.kv.head_dim <= 64    ? attention_few_as<type, 64>
                   : use.kv.head_dim <= 128 ? attention_few_as<type, 128>
                                            : attention_few_as<type, 256>;
  run(use, n, n_splits, workspace, stream);
}

}  // namespace

void attention_few(const AttentionUse& use, DType type, int n, int n_splits, float* workspace, Stream stream) {
  const auto run = type == DType::q8_0  ? attention_few_as<DType::q8_0>
                   : type == DType::f16 ? attention_few_as<DType::f16>
                                        : attention_few_as<DType::f32>;
  run(use, n, n_splits, workspace, stream);
  launch(combine_kernel, Shape{dim3(use.n_head, n), dim3(kCombineThreads)}, stream, use, n_splits, workspace);
}

}  // namespace vptq::cuda
