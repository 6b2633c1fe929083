// Attention of prompts' tokens on tensor cores, in tiles of 64 tokens of a head by 64 keys, with a running softmax
// (FlashAttention-2, Dao 2023). Sums and the softmax are float32. What is rounded to f16 is the softmax's weights and
// the keys and values of a q8_0 cache; q is two f16 numbers, as scores can be large and are exponents. So of an f16
// cache a product q k is as good as in float32.
//
// Tiles of keys begin at multiples of their size, and a tile that a token sees nothing of changes nothing for it: so it
// does not matter which tokens share a tile. Where sequences meet in a tile, it takes one after the other.
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/attention.cuh"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargestHalf = 65504;

constexpr int kTokens = 64, kWarpTokens = 16, kThreads = kTokens / kWarpTokens * kWarp;
static_assert(kTokens <= kThreads);

// A matrix (rows, kWidth) of f16 in shared memory. Pieces of 16 bytes change places within a row, so that the same
// columns of 8 rows, as load_matrices() wants them, lie in different banks.
template <int kWidth>
struct Halves {
  uint16_t* first;

  VPTQ_DEVICE uint16_t* at(int row, int column) const {
    return first + row * kWidth + ((column / 8 ^ row % 8) * 8 + column % 8);
  }
  VPTQ_DEVICE void put(int row, int column, uint4 eight) const { *reinterpret_cast<uint4*>(at(row, column)) = eight; }
};

// Tokens [begin, end) of a tile, all of one sequence, and what they see.
struct Run {
  int begin, end, sequence;
  int first_key, last_key;        // that any of them sees
  int first_common, last_common;  // that all of them see; none if first_common > last_common
};

VPTQ_DEVICE Run run_from(const AttentionUse& use, int begin, int n, const int* positions, const int* sequences) {
  const int p = positions[begin], first = use.first_seen(p);
  Run run{begin, begin + 1, sequences[begin], first, p, first, p};
  for (; run.end < n && sequences[run.end] == run.sequence; ++run.end) {
    const int position = positions[run.end], seen = use.first_seen(position);
    run.first_key = seen < run.first_key ? seen : run.first_key;
    run.last_key = position > run.last_key ? position : run.last_key;
    run.first_common = seen > run.first_common ? seen : run.first_common;
    run.last_common = position < run.last_common ? position : run.last_common;
  }
  return run;
}

// Rows of keys or values from position `first` on, as f16; 0 behind last_key, where anything may lie, and behind
// head_dim. Copies may be under way after it.
template <DType type, int kKeys, int kWidth>
VPTQ_DEVICE void load_rows(const AttentionUse& use, const Run& run, size_t offset, int first, Halves<kWidth> to) {
  constexpr int kPiece = KvFormat<type>::kChunk, kPieces = kWidth / kPiece;
  const int head_dim = use.kv.head_dim;
#pragma unroll 2
  for (int i = threadIdx.x; i < kKeys * kPieces; i += kThreads) {
    const int row = i / kPieces, d = i % kPieces * kPiece, position = first + row;
    if (position > run.last_key || d >= head_dim) {
#pragma unroll
      for (int j = 0; j < kPiece; j += 8) to.put(row, d + j, make_uint4(0, 0, 0, 0));
      continue;
    }
    const std::byte* head = block_of(use.batch, run.sequence, position) + offset;
    if constexpr (type == DType::f16) {
      const int64_t at = int64_t{position % kBlockTokens} * head_dim + d;
      copy_async(to.at(row, d), reinterpret_cast<const uint16_t*>(head) + at);
    } else {
      float x[kPiece];
      KvFormat<type>::to_floats(KvFormat<type>::load(head, head_dim, position % kBlockTokens, d), x);
      uint32_t pairs[kPiece / 2];
      // NaN stays NaN. Infinity among the values would reach those who do not see it, times a weight of 0.
      const auto bounded = [](float f) {
        return f > kLargestHalf ? kLargestHalf : f < -kLargestHalf ? -kLargestHalf : f;
      };
#pragma unroll
      for (int j = 0; j < kPiece / 2; ++j) pairs[j] = floats_to_halves(bounded(x[2 * j]), bounded(x[2 * j + 1]));
      to.put(row, d, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
      to.put(row, d + 8, make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]));
    }
  }
}

// q of n tokens, scaled, as the sum of two f16 numbers.
template <int kWidth>
VPTQ_DEVICE void load_q(const AttentionUse& use, int first_token, int n, int head, Halves<kWidth> high,
                        Halves<kWidth> low) {
  const int head_dim = use.kv.head_dim;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTokens * kWidth / 4; i += kThreads) {
    const int row = i / (kWidth / 4), d = i % (kWidth / 4) * 4;
    const float* from = use.q + (int64_t{first_token + row} * use.n_head + head) * head_dim + d;
    const float4 x = row < n && d < head_dim ? *reinterpret_cast<const float4*>(from) : make_float4(0, 0, 0, 0);
    const float2 a = make_float2(x.x * use.scale, x.y * use.scale), b = make_float2(x.z * use.scale, x.w * use.scale);
    const uint2 rounded = make_uint2(floats_to_halves(a.x, a.y), floats_to_halves(b.x, b.y));
    const float2 c = halves_to_floats(rounded.x), e = halves_to_floats(rounded.y);
    *reinterpret_cast<uint2*>(high.at(row, d)) = rounded;
    *reinterpret_cast<uint2*>(low.at(row, d)) =
        make_uint2(floats_to_halves(a.x - c.x, a.y - c.y), floats_to_halves(b.x - e.x, b.y - e.y));
  }
}

// Fragments of a warp's matrices (16, 8): a lane has rows lane / 4 and lane / 4 + 8 of columns lane % 4 * 2 and the
// next: elements (0, 1) and (2, 3).

// scores (16, kKeys) = q K^T of the warp's tokens
template <int kKeys, int kWidth>
VPTQ_DEVICE void multiply_keys(Halves<kWidth> high, Halves<kWidth> low, Halves<kWidth> keys, int head_dim,
                               float (&scores)[kKeys / 8][4]) {
  const int lane = threadIdx.x % kWarp, q_row = int(threadIdx.x) / kWarp * kWarpTokens + lane % 16;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0;
  for (int d = 0; d < head_dim; d += 16) {
    uint32_t q_high[4], q_low[4];
    load_matrices(q_high, high.at(q_row, d + lane / 16 * 8));
    load_matrices(q_low, low.at(q_row, d + lane / 16 * 8));
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t k[4];
      load_matrices(k, keys.at(n * 8 + lane / 16 * 8 + lane % 8, d + lane / 8 % 2 * 8));
      const uint32_t first[2] = {k[0], k[1]}, second[2] = {k[2], k[3]};
      mma_f16(scores[n], q_high, first);
      mma_f16(scores[n + 1], q_high, second);
      mma_f16(scores[n], q_low, first);
      mma_f16(scores[n + 1], q_low, second);
    }
  }
}

// Minus infinity where a token does not see a key.
template <int kKeys>
VPTQ_DEVICE void hide(const AttentionUse& use, int first_key, const int (&last_seen)[2],
                      float (&scores)[kKeys / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int first_seen = use.first_seen(last_seen[r]);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = first_key + n * 8 + int(threadIdx.x) % 4 * 2 + i;
        if (key < first_seen || key > last_seen[r]) scores[n][2 * r + i] = -kInfinity;
      }
  }
}

// A lane's part of the sums of its two tokens.
template <int kWidth>
struct Sums {
  float largest[2] = {-kInfinity, -kInfinity};  // score so far: the others are relative to it
  float total[2] = {0, 0};                      // of the weights that this lane has seen
  float values[kWidth / 8][4] = {};
};

// Makes weights of scores, in f16.
template <int kKeys, int kWidth>
VPTQ_DEVICE void softmax(float (&scores)[kKeys / 8][4], Sums<kWidth>& sums, uint32_t (&weights)[kKeys / 8][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float before = sums.largest[r];
    float largest = before;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) largest = fmaxf(largest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    if (largest != before) {
      const float keep = exp_fast(before - largest);
      sums.largest[r] = largest;
      sums.total[r] *= keep;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        sums.values[n][2 * r] *= keep;
        sums.values[n][2 * r + 1] *= keep;
      }
    }
    const float base = largest == -kInfinity ? 0 : largest;  // nothing seen yet
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float a = exp_fast(scores[n][2 * r] - base), b = exp_fast(scores[n][2 * r + 1] - base);
      sums.total[r] += a + b;
      weights[n][r] = floats_to_halves(a, b);
    }
  }
}

// values += weights V
template <int kKeys, int kWidth>
VPTQ_DEVICE void multiply_values(const uint32_t (&weights)[kKeys / 8][2], Halves<kWidth> values, int head_dim,
                                 Sums<kWidth>& sums) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kKeys / 8; k += 2) {
    const uint32_t a[4] = {weights[k][0], weights[k][1], weights[k + 1][0], weights[k + 1][1]};
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 2) {
      if (n * 8 >= head_dim) break;
      uint32_t v[4];
      load_matrices_transposed(v, values.at(k * 8 + lane % 16, n * 8 + lane / 16 * 8));
      const uint32_t first[2] = {v[0], v[1]}, second[2] = {v[2], v[3]};
      mma_f16(sums.values[n], a, first);
      mma_f16(sums.values[n + 1], a, second);
    }
  }
}

// A run's keys, tile by tile. While one matrix is multiplied, the other is loaded.
template <DType type, int kKeys, int kWidth>
VPTQ_DEVICE void add_run(const AttentionUse& use, const Run& run, bool alone, int kv_head, const int* positions,
                         Halves<kWidth> high, Halves<kWidth> low, Halves<kWidth> keys, Halves<kWidth> values,
                         Sums<kWidth>& sums) {
  int last_seen[2];  // by the lane's tokens; those outside the run see nothing
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = int(threadIdx.x) / kWarp * kWarpTokens + threadIdx.x % kWarp / 4 + r * 8;
    last_seen[r] = row >= run.begin && row < run.end ? positions[row] : -1;
  }
  const size_t head = kv_head * use.kv.head_bytes;
  const auto load_keys = [&](int first) {
    if (first <= run.last_key) load_rows<type, kKeys>(use, run, use.kv.keys + head, first, keys);
    commit_copies();
  };
  const auto load_values = [&](int first) {
    if (first <= run.last_key) load_rows<type, kKeys>(use, run, use.kv.values + head, first, values);
    commit_copies();
  };
  int first = run.first_key / kKeys * kKeys;
  load_keys(first);
  load_values(first);
  for (; first <= run.last_key; first += kKeys) {
    float scores[kKeys / 8][4];
    uint32_t weights[kKeys / 8][2];
    wait_copies<1>();
    sync_block();
    multiply_keys<kKeys>(high, low, keys, use.kv.head_dim, scores);
    sync_block();
    load_keys(first + kKeys);
    if (!alone || first < run.first_common || first + kKeys - 1 > run.last_common)
      hide<kKeys>(use, first, last_seen, scores);
    softmax<kKeys>(scores, sums, weights);
    wait_copies<1>();
    sync_block();
    multiply_values<kKeys>(weights, values, use.kv.head_dim, sums);
    sync_block();
    load_values(first + kKeys);
  }
}

// A tile of tokens of a head; kWidth >= head_dim. Tiles with the most keys, which are the last of a prompt, begin
// first.
template <DType type, int kKeys, int kWidth>
__global__ void __launch_bounds__(kThreads) attention_many_kernel(AttentionUse use, int n_tokens) {
  __shared__ int positions[kTokens], sequences[kTokens];
  auto* const shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  const Halves<kWidth> high{shared}, low{high.first + kTokens * kWidth}, keys{low.first + kTokens * kWidth},
      values{keys.first + kKeys * kWidth};
  const int tile = int(gridDim.x - 1 - blockIdx.x), first_token = tile * kTokens, head = blockIdx.y;
  const int n = n_tokens - first_token < kTokens ? n_tokens - first_token : kTokens;
  if (const int i = threadIdx.x; i < n) {
    positions[i] = use.batch.positions[first_token + i];
    sequences[i] = use.batch.sequences[first_token + i];
  }
  load_q(use, first_token, n, head, high, low);
  sync_block();

  Sums<kWidth> sums;
  for (int begin = 0; begin < n;) {
    const Run run = run_from(use, begin, n, positions, sequences);
    const bool alone = run.begin == 0 && run.end == n;
    add_run<type, kKeys>(use, run, alone, head / use.heads_per_kv(), positions, high, low, keys, values, sums);
    begin = run.end;
  }

  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sums.total[r] += shuffle_xor(sums.total[r], 1);
    sums.total[r] += shuffle_xor(sums.total[r], 2);
    const int row = int(threadIdx.x) / kWarp * kWarpTokens + lane / 4 + r * 8;
    if (row >= n) continue;
    const float share = 1 / sums.total[r];
    float* out = use.out + (int64_t{first_token + row} * use.n_head + head) * use.kv.head_dim;
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i)
      if (i * 8 < use.kv.head_dim)
        *reinterpret_cast<float2*>(out + i * 8 + lane % 4 * 2) =
            make_float2(sums.values[i][2 * r] * share, sums.values[i][2 * r + 1] * share);
  }
}

template <DType type, int kWidth>
void attention_many_as(const AttentionUse& use, int n, Stream stream) {
  constexpr int kKeys = kWidth > 128 ? 32 : 64;
  constexpr size_t kShared = 2 * (kTokens + kKeys) * kWidth * sizeof(uint16_t);
  static_assert(kShared + 2 * kTokens * sizeof(int) <= kLeastShared);
  const auto kernel = attention_many_kernel<type, kKeys, kWidth>;
  allow_shared(kernel, kShared);
  launch(kernel, Shape{dim3((n + kTokens - 1) / kTokens, use.n_head), dim3(kThreads), kShared}, stream, use, n);
}

template <DType type>
void attention_many_as(const AttentionUse& use, int n, Stream stream) {
  const auto run = use.kv.head_dim <= 64    ? attention_many_as<type, 64>
                   : use.kv.head_dim <= 128 ? attention_many_as<type, 128>
                                            : attention_many_as<type, kMaxHeadDim>;
  run(use, n, stream);
}

}  // namespace

bool attention_many_can(DType type, int head_dim) {
  return type == DType::q8_0 || (type == DType::f16 && head_dim % KvFormat<DType::f16>::kChunk == 0);
}

void attention_many(const AttentionUse& use, DType type, int n, Stream stream) {
  const auto run = type == DType::q8_0 ? attention_many_as<DType::q8_0> : attention_many_as<DType::f16>;
  run(use, n, stream);
}

}  // namespace vptq::cuda
