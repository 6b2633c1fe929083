// A vector-quantised matrix times the activations of up to kSlicedTokens tokens: centroids gathered from shared memory,
// a slice of a codebook at a time. slices.h says in which order the indices lie and why.
//
// A token's sums are added in an order that depends on the layer alone: a list's in lanes, the lanes' in a tree, the
// slices' one after another in a kernel of its own, which can apply norms and bias as well.
//
// Bound on an H200, for vectors of 8 and one token, a round of 32 entries: shared memory takes 4 cycles for the
// centroids and 1 for x, 5.1 and 2.5 with the conflicts that are left; 27 instructions (8 conversions, 8 products, 2
// loads, 9 for the rest) take 6.8 on four schedulers; 128 bytes of entries 7, of 4.3 TB/s over 132 multiprocessors. A
// list adds the sum over the lanes: 52 instructions, 9 shuffles.
#include <algorithm>

#include "cuda/kernels/vq.cuh"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kRoundsAtOnce = 2;  // whose loads from shared memory are on their way together
constexpr int kSumThreads = 256;
constexpr int kLine = 128;  // bytes

struct SlicedUses {
  SlicedUse use[kMaxUses];
  float* partial[kMaxUses];  // (n_slices, n, out_features)
};

// Threads of a block, as many as have registers for their sums.
template <int kSums>
constexpr int kThreads = kSums <= 8    ? 1024
                         : kSums <= 16 ? 768
                         : kSums <= 32 ? 512
                                       : 384;

// The shared memory of a block: a slice's centroids, the second row of each after the first rows of all, and x of a
// window, column by column, with zeros for the column after the last.
struct Shared {
  uint4* centroids;
  int n_centroids;  // between a centroid's two rows
  float* x;
};

VPTQ_DEVICE bool same_centroids(const Slice& a, const Slice& b) {
  return a.columns == b.columns && a.residual == b.residual && a.first_centroid == b.first_centroid;
}

template <int kRows>
VPTQ_DEVICE void load_slice(const VqColumns& c, const Slice& slice, const Shared& shared) {
  const std::byte* codebook = slice.residual ? c.res_centroids : c.centroids;
  const uint16_t* from = reinterpret_cast<const uint16_t*>(codebook) + static_cast<size_t>(slice.first_centroid) * c.v;
  const int thread = static_cast<int>(threadIdx.x), n_threads = static_cast<int>(blockDim.x);
  if (c.v == kRows) {
    constexpr int kParts = kRows / 8;
    for (int i = thread; i < slice.n_centroids * kParts; i += n_threads)
      copy_async(shared.centroids + i % kParts * shared.n_centroids + i / kParts, from + 8 * i);
    return;
  }
  for (int i = thread; i < slice.n_centroids * (kRows / 8); i += n_threads) {
    const int centroid = i % slice.n_centroids, first = i / slice.n_centroids * 8;
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint16_t* p = from + static_cast<size_t>(centroid) * c.v + first + j;
      words[j / 2] = (first + j < c.v ? p[0] : 0u) | (first + j + 1 < c.v ? p[1] : 0u) << 16;
    }
    shared.centroids[first / 8 * shared.n_centroids + centroid] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// x permuted and scaled, (n_columns + 1, kTokens), the last ones 0.
template <int kTokens>
VPTQ_DEVICE void load_x(const VqLayer& w, const Slice& slice, const float* x, int n, float* shared) {
  load_columns<kTokens>(w, slice.first_column, slice.n_columns, x, n,
                        [&](int j, int, float scale, const float (&xs)[kTokens]) {
#pragma unroll
                          for (int t = 0; t < kTokens; ++t) shared[j * kTokens + t] = xs[t] * scale;
                        });
  if (threadIdx.x < kTokens) shared[slice.n_columns * kTokens + threadIdx.x] = 0;
}

template <int kTokens>
VPTQ_DEVICE void load_column(const std::byte* column, float (&x)[kTokens]) {
  if constexpr (kTokens == 4) {
    const float4 v = *reinterpret_cast<const float4*>(column);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else if constexpr (kTokens == 2) {
    const float2 v = *reinterpret_cast<const float2*>(column);
    x[0] = v.x, x[1] = v.y;
  } else {
    x[0] = *reinterpret_cast<const float*>(column);
  }
}

template <bool kBf16>
VPTQ_DEVICE float2 pair_to_floats(uint32_t bits) {
  if constexpr (kBf16)
    return make_float2(bf16_to_float(static_cast<uint16_t>(bits)), bf16_to_float(static_cast<uint16_t>(bits >> 16)));
  else
    return halves_to_floats(bits);
}

// sums (kTokens, kRows) += x w
template <int kRows, int kTokens, bool kBf16>
VPTQ_DEVICE void add_centroid(const uint4 (&w)[kRows / 8], const float (&x)[kTokens], float (&sums)[kRows * kTokens]) {
#pragma unroll
  for (int p = 0; p < kRows / 8; ++p) {
    const uint32_t words[4] = {w[p].x, w[p].y, w[p].z, w[p].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = pair_to_floats<kBf16>(words[j]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float* sum = sums + t * kRows + p * 8 + j * 2;
        sum[0] = fmaf(pair.x, x[t], sum[0]);
        sum[1] = fmaf(pair.y, x[t], sum[1]);
      }
    }
  }
}

// Sums over the lanes, each of its own part of the values: afterwards lane l has in values[0 ... max(1, kCount / 32))
// the sums of the values from l * kCount / 32 on. In the same tree for any kCount. kLeft values are left to be summed
// over lanes that differ in the bits up to kMask.
template <int kLeft, int kMask = kWarp / 2, int kCount>
VPTQ_DEVICE void sum_lanes(float (&values)[kCount], int lane) {
  constexpr int kHalf = kLeft / 2;
  if constexpr (kHalf == 0) values[0] += shuffle_xor(values[0], kMask);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = values[i], high = values[i + kHalf];
    values[i] = (lane & kMask ? high : low) + shuffle_xor(lane & kMask ? low : high, kMask);
  }
  if constexpr (kMask > 1) sum_lanes<kHalf == 0 ? 1 : kHalf, kMask / 2>(values, lane);
}

// The lists of one run, a warp's work. partial (n, out_features), the slice's.
template <int kRows, int kTokens, bool kBf16>
VPTQ_DEVICE void add_run(const uint4* chunks, int n_chunks, const Shared& shared, int v, int block, int n,
                         int out_features, float* partial) {
  constexpr int kSums = kRows * kTokens, kPerLane = kSums > kWarp ? kSums / kWarp : 1;
  constexpr int kLanesPerSum = kSums < kWarp ? kWarp / kSums : 1;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::byte* centroids = reinterpret_cast<const std::byte*>(shared.centroids);
  const std::byte* columns = reinterpret_cast<const std::byte*>(shared.x);
  const int second_rows = shared.n_centroids * 16;
  float sums[kSums] = {};
  // Two chunks are on their way while one is worked on.
  uint4 now = load_once(chunks + lane), next = now;
  if (n_chunks > 1) next = load_once(chunks + kWarp + lane);
  for (int i = 0; i < n_chunks; ++i) {
    uint4 later = next;
    if (i + 2 < n_chunks) later = load_once(chunks + (i + 2) * kWarp + lane);
    const uint32_t entries[kChunkRounds] = {now.x, now.y, now.z, now.w};
#pragma unroll
    for (int first = 0; first < kChunkRounds; first += kRoundsAtOnce) {
      uint4 w[kRoundsAtOnce][kRows / 8];
      float x[kRoundsAtOnce][kTokens];
#pragma unroll
      for (int r = 0; r < kRoundsAtOnce; ++r) {
#pragma unroll
        for (int p = 0; p < kRows / 8; ++p)
          w[r][p] = *reinterpret_cast<const uint4*>(centroids + (entries[first + r] & kIndexMask) + p * second_rows);
        load_column<kTokens>(columns + (entries[first + r] >> 16) * kTokens, x[r]);
      }
#pragma unroll
      for (int r = 0; r < kRoundsAtOnce; ++r) {
        add_centroid<kRows, kTokens, kBf16>(w[r], x[r], sums);
        if (!all_alike(entries[first + r] & kLastRound)) continue;
        sum_lanes<kSums>(sums, lane);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const int t = (lane * kSums / kWarp + i) / kRows, row = (lane * kSums / kWarp + i) % kRows;
          if (lane % kLanesPerSum == 0 && t < n && row < v && block * v + row < out_features)
            partial[static_cast<int64_t>(t) * out_features + block * v + row] = sums[i];
        }
        ++block;
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0;
      }
    }
    now = next;
    next = later;
  }
}

// A warp's part of a job, run by run.
template <int kRows, int kTokens>
VPTQ_DEVICE void do_job(const SliceJob& job, const SlicedUse& use, const float* x, int n, bool new_slice,
                        const Shared& shared, float* partial) {
  const Slice& slice = job.slice;
  const VqColumns& c = use.layer.columns[slice.columns];
  const uint32_t* run_begin = use.run_begin + slice.first_run;
  const uint4* entries = reinterpret_cast<const uint4*>(use.entries);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, n_warps = static_cast<int>(blockDim.x) / kWarp;
  // From lane 0: for the compiler, what comes by a shuffle is the same in all lanes.
  int run = job.run + shuffle(static_cast<int>(threadIdx.x) / kWarp, 0);
  if (new_slice) load_slice<kRows>(c, slice, shared);
  commit_copies();
  if (run < job.end_run) {  // the wait for the slice and x is used to bring the first run into L2
    const std::byte* begin = reinterpret_cast<const std::byte*>(entries + static_cast<size_t>(run_begin[run]) * kWarp);
    const std::byte* end =
        reinterpret_cast<const std::byte*>(entries + static_cast<size_t>(run_begin[run + 1]) * kWarp);
    for (const std::byte* p = begin + lane * kLine; p < end; p += kWarp * kLine) prefetch(p);
  }
  load_x<kTokens>(use.layer, slice, x, n, shared.x);
  wait_copies<0>();
  sync_block();
  for (; run < job.end_run; run += n_warps) {
    const uint4* chunks = entries + static_cast<size_t>(run_begin[run]) * kWarp;
    const int n_chunks = static_cast<int>(run_begin[run + 1] - run_begin[run]), block = run * slice.blocks_per_run;
    if (c.type == DType::bf16)
      add_run<kRows, kTokens, true>(chunks, n_chunks, shared, c.v, block, n, use.layer.out_features, partial);
    else
      add_run<kRows, kTokens, false>(chunks, n_chunks, shared, c.v, block, n, use.layer.out_features, partial);
  }
}

template <int kRows, int kTokens>
__global__ void __launch_bounds__((kThreads<kRows * kTokens>), 1)
    vq_sliced_kernel(SlicedUses uses, const SliceJob* __restrict__ jobs, int n_centroids, const float* __restrict__ x,
                     int n) {
  const Shared shared{reinterpret_cast<uint4*>(dynamic_shared()), n_centroids,
                      reinterpret_cast<float*>(dynamic_shared() + n_centroids * kRows * 2)};
  int before = -1;
  for (int j = static_cast<int>(blockIdx.x); j >= 0; j = jobs[j].next) {
    const SliceJob job = jobs[j];
    const SlicedUse& use = uses.use[job.layer];
    const bool new_slice =
        before < 0 || jobs[before].layer != job.layer || !same_centroids(jobs[before].slice, job.slice);
    float* partial = uses.partial[job.layer] + static_cast<int64_t>(job.number) * n * use.layer.out_features;
    do_job<kRows, kTokens>(job, use, x, n, new_slice, shared, partial);
    sync_block();
    before = j;
  }
}

// y (n, out_features) from the slices' sums.
__global__ void __launch_bounds__(kSumThreads) sum_slices(SlicedUses uses, const float* __restrict__ x, int n) {
  __shared__ float warps[kSumThreads / kWarp];
  const SlicedUse& use = uses.use[blockIdx.y];
  const VqLayer& w = use.layer;
  const int thread = static_cast<int>(threadIdx.x), t = static_cast<int>(blockIdx.z);
  const int row = static_cast<int>(blockIdx.x) * kSumThreads + thread;
  if (row - thread >= w.out_features) return;
  float offset = 0;
  if (has_offset(w)) {
    const float* xt = x + static_cast<int64_t>(t) * w.in_features;
    for (int i = thread; i < w.in_features; i += kSumThreads) offset = add_to_offset(w, i, xt[i], offset);
    for (int mask = kWarp / 2; mask > 0; mask /= 2) offset += shuffle_xor(offset, mask);
    if (thread % kWarp == 0) warps[thread / kWarp] = offset;
    sync_block();
    offset = 0;
    for (float part : warps) offset += part;
  }
  if (row >= w.out_features) return;
  const float* partial = uses.partial[blockIdx.y] + static_cast<int64_t>(t) * w.out_features + row;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < use.n_slices; ++s) sum += partial[static_cast<int64_t>(s) * n * w.out_features];
  use.y[static_cast<int64_t>(t) * w.out_features + row] = finish_output(w, row, sum, offset);
}

template <int kRows, int kTokens>
void launch_sliced(const SlicedUses& uses, const DeviceSliceJobs& jobs, const float* x, int n, Stream stream) {
  const size_t shared = static_cast<size_t>(jobs.n_centroids) * kRows * 2 +
                        static_cast<size_t>(jobs.n_columns + 1) * kTokens * sizeof(float);
  allow_shared(vq_sliced_kernel<kRows, kTokens>, jobs.most_shared);
  launch(vq_sliced_kernel<kRows, kTokens>, {dim3(jobs.n_blocks), dim3(kThreads<kRows * kTokens>), shared}, stream, uses,
         jobs.jobs, jobs.n_centroids, x, n);
}

template <int kRows>
void launch_tokens(const SlicedUses& uses, const DeviceSliceJobs& jobs, const float* x, int n, Stream stream) {
  if (n == 1)
    launch_sliced<kRows, 1>(uses, jobs, x, n, stream);
  else if (n == 2)
    launch_sliced<kRows, 2>(uses, jobs, x, n, stream);
  else
    launch_sliced<kRows, kSlicedTokens>(uses, jobs, x, n, stream);
}

// Floats of the slices' sums of n tokens.
size_t partial_size(const SlicedUse& use, int n) {
  return static_cast<size_t>(use.n_slices) * std::min(n, kSlicedTokens) * use.layer.out_features;
}

}  // namespace

size_t sliced_workspace(const SlicedUse* uses, int n_uses, int n) {
  size_t size = 0;
  for (int u = 0; u < n_uses; ++u) size += partial_size(uses[u], n);
  return size;
}

void vq_sliced(const SlicedUse* uses, int n_uses, const DeviceSliceJobs& jobs, const float* x, int n, float* workspace,
               Stream stream) {
  SlicedUses sliced{};
  int out_features = 0, v = 0;  // the largest
  for (int u = 0; u < n_uses; ++u) {
    sliced.use[u] = uses[u];
    sliced.partial[u] = workspace;
    workspace += partial_size(uses[u], n);
    const VqLayer& w = uses[u].layer;
    out_features = std::max(out_features, w.out_features);
    for (int part = 0; part < w.n_columns; ++part) v = std::max(v, w.columns[part].v);
  }
  for (int first = 0; first < n; first += kSlicedTokens) {
    const int n_tokens = std::min(n - first, kSlicedTokens);
    if (v <= 8)
      launch_tokens<8>(sliced, jobs, x, n_tokens, stream);
    else
      launch_tokens<kMaxSlicedVector>(sliced, jobs, x, n_tokens, stream);
    launch(sum_slices, {dim3((out_features + kSumThreads - 1) / kSumThreads, n_uses, n_tokens), dim3(kSumThreads)},
           stream, sliced, x, n_tokens);
    x += static_cast<int64_t>(n_tokens) * uses->layer.in_features;
    for (int u = 0; u < n_uses; ++u) sliced.use[u].y += static_cast<int64_t>(n_tokens) * uses[u].layer.out_features;
  }
}

}  // namespace vptq::cuda
