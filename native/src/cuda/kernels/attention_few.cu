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
constexpr int kTeamThreads = kWarps * kWarp, kCombineThreads = 64;

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

// What sums relative to a score have to be multiplied by to be relative to the largest.
VPTQ_DEVICE float share_of(float score, float largest) { return score == largest ? 1.0f : exp_fast(score - largest); }

// What is the same for all of a kernel's functions: rows of kWidth >= head_dim elements, kHeads query heads a team.
template <DType type, int kWidth, int kHeads>
struct Few {
  using Format = KvFormat<type>;
  static constexpr int kChunk = Format::kChunk, kChunks = kElements / kChunk;
  static constexpr int kLanes = kWidth / kElements;                                // of a row
  static constexpr int kWarpRows = kWarp / kLanes;                                 // that a warp loads at once
  static constexpr int kWarpStep = kWarpRows * kRows, kStep = kWarps * kWarpStep;  // positions
  static_assert(kBlockTokens % kWarpStep == 0, "a warp's rows are all of one block");

  using Part = typename Format::Chunk[kChunks];  // a lane's elements of a row
  using Floats = float[kElements];

  // What a part of a warp has added up so far: e^(score - largest), and the values, weighted by it. A NaN among the
  // scores does not become the largest, but the total.
  struct Sums {
    float largest, total;
    Floats values;
  };
  // The same of a block's warps, in shared memory; before that, q in warp 0's values.
  struct Shared {
    float largest[kMostTeams][kWarps][kHeads], total[kMostTeams][kWarps][kHeads];
    float values[kMostTeams][kWarps][kHeads][kWidth];
  };

  static VPTQ_DEVICE int lane() { return threadIdx.x % kLanes; }
  static VPTQ_DEVICE int row() { return threadIdx.x % kWarp / kLanes; }
  static VPTQ_DEVICE int warp() { return threadIdx.x / kWarp % kWarps; }
  static VPTQ_DEVICE int team() { return threadIdx.x / kTeamThreads; }
  // The first of a lane's chunk j: a row's lanes load 16 bytes each, side by side.
  static VPTQ_DEVICE int element(int j) { return (j * kLanes + lane()) * kChunk; }

  static VPTQ_DEVICE void to_floats(const Part& part, Floats& x) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float chunk[kChunk];
      Format::to_floats(part[j], chunk);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[j * kChunk + i] = chunk[i];
    }
  }

  // A lane's elements of each head's q, scaled; 0 for n_heads and more. q (n_heads, head_dim)
  static VPTQ_DEVICE void load_q(const float* q, int n_heads, int head_dim, float scale, Shared& shared,
                                 Floats (&out)[kHeads]) {
    float (&staged)[kHeads][kWidth] = shared.values[team()][0];
#pragma unroll
    for (int i = 0; i < kHeads * kWidth; i += kTeamThreads) {
      const int at = i + threadIdx.x % kTeamThreads, h = at / kWidth, d = at % kWidth;
      if (h < kHeads) staged[h][d] = h < n_heads && d < head_dim ? q[int64_t{h} * head_dim + d] * scale : 0.0f;
    }
    sync_block();
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll
      for (int i = 0; i < kElements; ++i) out[h][i] = staged[h][element(i / kChunk) + i % kChunk];
    sync_block();
  }

  // The rows of a warp's positions from p on, all of one block. In place of a row that is not seen, one that is.
  static VPTQ_DEVICE void load(const std::byte* head, int head_dim, Positions seen, int p, Part (&parts)[kRows]) {
    head = to_global(head);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int position = p + r * kWarpRows + row(), from = position > seen.begin ? position : seen.begin;
      const int token = (from < seen.end ? from : seen.end - 1) % kBlockTokens;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) parts[r][j] = Format::load(head, head_dim, token, element(j));
    }
  }

  static VPTQ_DEVICE void scores(const Floats (&q)[kHeads], const Part (&keys)[kRows], float (&out)[kRows][kHeads]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Floats key;
      to_floats(keys[r], key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < kElements; ++i) score = fmaf(q[h][i], key[i], score);
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) score += shuffle_xor(score, mask);
        out[r][h] = score;
      }
    }
  }

  // Makes weights of the scores of positions p on.
  static VPTQ_DEVICE void softmax(Positions seen, int p, float (&scores)[kRows][kHeads], Sums (&sums)[kHeads]) {
    bool visible[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int position = p + r * kWarpRows + row();
      visible[r] = position >= seen.begin && position < seen.end;
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float largest = sums[h].largest;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (visible[r]) largest = fmaxf(largest, scores[r][h]);
      if (largest != sums[h].largest) {
        const float keep = exp_fast(sums[h].largest - largest);
        sums[h].largest = largest;
        sums[h].total *= keep;
#pragma unroll
        for (int i = 0; i < kElements; ++i) sums[h].values[i] *= keep;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scores[r][h] = visible[r] ? exp_fast(scores[r][h] - largest) : 0.0f;
        sums[h].total += scores[r][h];
      }
    }
  }

  static VPTQ_DEVICE void add_values(const float (&weights)[kRows][kHeads], const Part (&values)[kRows],
                                     Sums (&sums)[kHeads]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Floats value;
      to_floats(values[r], value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
#pragma unroll
        for (int i = 0; i < kElements; ++i) sums[h].values[i] = fmaf(weights[r][h], value[i], sums[h].values[i]);
    }
  }

  // Adds up the parts of a warp.
  static VPTQ_DEVICE void share(Sums (&sums)[kHeads], Shared& shared) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      Sums& s = sums[h];
#pragma unroll
      for (int mask = kLanes; mask < kWarp; mask *= 2) {
        const float other = shuffle_xor(s.largest, mask), largest = fmaxf(s.largest, other);
        const float keep = share_of(s.largest, largest), add = share_of(other, largest);
        s.largest = largest;
        s.total = s.total * keep + shuffle_xor(s.total, mask) * add;
#pragma unroll
        for (int i = 0; i < kElements; ++i) s.values[i] = s.values[i] * keep + shuffle_xor(s.values[i], mask) * add;
      }
      if (row() > 0) continue;
      if (lane() == 0) {
        shared.largest[team()][warp()][h] = s.largest;
        shared.total[team()][warp()][h] = s.total;
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        shared.values[team()][warp()][h][element(i / kChunk) + i % kChunk] = s.values[i];
    }
  }

  // Adds up a head's sums of a team's warps. to: largest, total, values
  static VPTQ_DEVICE void write(const Shared& shared, int h, int head_dim, float* to) {
    const int thread = threadIdx.x % kTeamThreads;
    float largest = -kInfinity, total = 0, shares[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.largest[team()][w][h]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      shares[w] = share_of(shared.largest[team()][w][h], largest);
      total += shared.total[team()][w][h] * shares[w];
    }
    if (thread == 0) {
      to[0] = largest;
      to[1] = total;
    }
    for (int d = thread; d < head_dim; d += kTeamThreads) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum = fmaf(shared.values[team()][w][h][d], shares[w], sum);
      to[2 + d] = sum;
    }
  }
};

// The sums of a split: partials (n, n_head, n_splits) of (head_dim + 2): largest, total, values.
template <DType type, int kWidth, int kHeads>
__global__ void __launch_bounds__(kMostTeams* kTeamThreads)
    attention_few_kernel(AttentionUse use, int n_splits, float* partials) {
  using F = Few<type, kWidth, kHeads>;
  __shared__ typename F::Shared shared;
  const int token = use.first_token + int(blockIdx.z), split = blockIdx.x, head_dim = use.kv.head_dim;
  const int kv_head = int(blockIdx.y) % use.kv.n_head_kv, per_kv = use.heads_per_kv();
  const int n_teams = blockDim.x / kTeamThreads;
  const int first_head = (int(blockIdx.y) / use.kv.n_head_kv * n_teams + F::team()) * kHeads;  // of the kv head's
  const int position = use.batch.positions[token];
  const Positions seen = positions_of_split(use.first_seen(position), position, split, n_splits);
  if (seen.begin >= seen.end) return;

  std::byte* const* blocks = use.batch.blocks + use.batch.first_block[use.batch.sequences[token]];
  const size_t keys = use.kv.keys + kv_head * use.kv.head_bytes, values = use.kv.values + kv_head * use.kv.head_bytes;
  const auto block_at = [&](int p) { return blocks[(p < seen.end ? p : seen.end - 1) / kBlockTokens]; };
  int p = seen.begin / kBlockTokens * kBlockTokens + F::warp() * F::kWarpStep;
  const std::byte* block = block_at(p);
  typename F::Part key_parts[kRows], value_parts[kRows];
  F::load(block + keys, head_dim, seen, p, key_parts);

  const int head = kv_head * per_kv + first_head;
  typename F::Floats q[kHeads];
  F::load_q(use.q + (int64_t{token} * use.n_head + head) * head_dim, per_kv - first_head, head_dim, use.scale, shared,
            q);
  typename F::Sums sums[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) sums[h] = {-kInfinity, 0, {}};
  for (; p < seen.end; p += F::kStep) {  // a step's keys are loaded during the one before it, its values during its own
    const std::byte* next = block_at(p + F::kStep);
    F::load(block + values, head_dim, seen, p, value_parts);
    float weights[kRows][kHeads];
    F::scores(q, key_parts, weights);
    F::load(next + keys, head_dim, seen, p + F::kStep, key_parts);
    F::softmax(seen, p, weights, sums);
    F::add_values(weights, value_parts, sums);
    block = next;
  }
  F::share(sums, shared);
  sync_block();
  for (int h = 0; h < kHeads && first_head + h < per_kv; ++h) {
    const int64_t row = int64_t{blockIdx.z} * use.n_head + head + h;
    F::write(shared, h, head_dim, partials + (row * n_splits + split) * (head_dim + 2));
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
  for (int s = threadIdx.x; s < n; s += kCombineThreads) shares[s] = share_of(partials[s * size], largest);
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
                    dim3(n_teams * kTeamThreads)};
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
                                            : attention_few_as<type, kMaxHeadDim>;
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
