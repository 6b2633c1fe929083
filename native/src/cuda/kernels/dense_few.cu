// y = W x + bias for a few tokens: bound by reading W once.
//
// A warp takes kRows rows. Their bytes stream through shared memory a segment at a time, copied in the background as
// whole 16-byte words wherever a row begins (Q8_0: 34 bytes a block); from there each lane picks four bytes of weights
// at a time, 1, 2 or 4 of them by type. One or two segments are on their way while one is multiplied, 2 KB each: a
// multiprocessor needs some 25 KB in flight to keep up with 4.3 TB/s, and has 16 to 32 warps. x comes through L1: a
// block's warps go through the columns together, so that it comes from L2 once a block.
//
// A lane adds up its columns in ascending order, then the lanes are added up as a tree: the same for any kTokens.
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/quantised.cuh"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kWarpSegmentBytes = 2 * 1088;

// What a block takes at a time. More tokens: more rows that share the loads of x, which are then 4 kTokens bytes a
// column for one or so of weights.
template <int kTokens>
struct Block {
  static constexpr int kRows = kTokens <= 2 ? 2 : 4;   // a warp
  static constexpr int kWarps = kTokens <= 2 ? 4 : 8;  // together less than 48 KiB
  static constexpr int kSegments =
      kTokens <= 2 ? 3 : 2;  // of each row in shared memory: one in use, the others on their way
};

// Where the four bytes from `byte` on lie, an even number: in a word, or in it and the next.
struct Place {
  uint32_t word, shift;

  VPTQ_DEVICE explicit Place(uint32_t byte) : word(byte / 4), shift(byte % 4 * 8) {}
  VPTQ_DEVICE uint32_t load(const uint32_t* words) const {
    const uint64_t both = uint64_t{words[word + 1]} << 32 | words[word];
    return static_cast<uint32_t>(both >> shift);
  }
};

// How the weights of a row lie in memory. A step is what a warp takes at a time: kColumns columns a lane, in whole
// words of all lanes. Made for a row that begins at `byte` of each segment; load(): a lane's weights of the step whose
// words those are.
template <DType Type>
struct DenseRow;
template <>
struct DenseRow<DType::f32> {
  static constexpr int kColumns = 1, kStepBytes = kWarp * 4;
  uint32_t word;

  VPTQ_DEVICE DenseRow(uint32_t byte, uint32_t lane) : word(byte / 4 + lane) {}
  VPTQ_DEVICE void load(const uint32_t* words, float (&w)[kColumns]) const { w[0] = float_from_bits(words[word]); }
};
template <>
struct DenseRow<DType::f16> {
  static constexpr int kColumns = 2, kStepBytes = kWarp * 4;
  Place place;

  VPTQ_DEVICE DenseRow(uint32_t byte, uint32_t lane) : place(byte + 4 * lane) {}
  VPTQ_DEVICE void load(const uint32_t* words, float (&w)[kColumns]) const {
    const float2 pair = halves_to_floats(place.load(words));
    w[0] = pair.x;
    w[1] = pair.y;
  }
};
template <>
struct DenseRow<DType::bf16> {
  static constexpr int kColumns = 2, kStepBytes = kWarp * 4;
  Place place;

  VPTQ_DEVICE DenseRow(uint32_t byte, uint32_t lane) : place(byte + 4 * lane) {}
  VPTQ_DEVICE void load(const uint32_t* words, float (&w)[kColumns]) const {
    const uint32_t pair = place.load(words);
    w[0] = float_from_bits(pair << 16);
    w[1] = float_from_bits(pair & 0xffff0000u);
  }
};
template <>
struct DenseRow<DType::q8_0> {
  static constexpr int kColumns = 4, kStepBytes = kWarp * kColumns / kQ8Block * kQ8BlockBytes;
  uint32_t scale;  // which half
  Place place;

  VPTQ_DEVICE DenseRow(uint32_t byte, uint32_t lane)
      : scale((byte + lane / 8 * kQ8BlockBytes) / 2), place(2 * scale + 2 + lane % 8 * 4) {}
  VPTQ_DEVICE void load(const uint32_t* words, float (&w)[kColumns]) const {
    q8_to_floats(place.load(words), half_to_float(reinterpret_cast<const uint16_t*>(words)[scale]), w);
  }
};
// Eight lanes a block: four of them take the lower halves of its last 16 bytes, four the upper ones.
template <DType Type>
struct PackedRow {
  static constexpr bool kFive = kBits<Type> == 5;
  static constexpr int kColumns = 4, kStepBytes = kWarp * kColumns / kBlock<Type> * kBlockBytes<Type>;
  uint32_t halves;  // which half d is
  Place fifth, lower;
  uint32_t first;  // of the lane's columns, in its block

  VPTQ_DEVICE PackedRow(uint32_t byte, uint32_t lane)
      : halves((byte + lane / 8 * kBlockBytes<Type>) / 2),
        fifth(2 * halves + kFifth<Type>),
        lower(2 * halves + kLower<Type> + lane % 4 * 4),
        first(lane % 8 * 4) {}
  VPTQ_DEVICE void load(const uint32_t* words, float (&w)[kColumns]) const {
    const auto* d = reinterpret_cast<const uint16_t*>(words) + halves;
    const uint32_t four = lower.load(words) >> (first < 16 ? 0 : 4), five = kFive ? fifth.load(words) >> first : 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) w[i] = packed_weight<Type>(d, (four >> 8 * i & 15) | (five >> i & 1) << 4);
  }
};
template <>
struct DenseRow<DType::q4_0> : PackedRow<DType::q4_0> {
  using PackedRow::PackedRow;
};
template <>
struct DenseRow<DType::q4_1> : PackedRow<DType::q4_1> {
  using PackedRow::PackedRow;
};
template <>
struct DenseRow<DType::q5_0> : PackedRow<DType::q5_0> {
  using PackedRow::PackedRow;
};
template <>
struct DenseRow<DType::q5_1> : PackedRow<DType::q5_1> {
  using PackedRow::PackedRow;
};

struct Matrix {
  const std::byte* weight;
  int64_t row_bytes;
  int in_features, out_features;
};

// Starts to copy bytes [begin, end) of the matrix, which is aligned to 16, as the 16-byte words that hold them. The
// last word of the matrix may not be whole: it goes by twos.
VPTQ_DEVICE void copy_segment(const Matrix& w, int64_t begin, int64_t end, int lane, uint4* segment) {
  const int64_t matrix_end = w.row_bytes * w.out_features;
  const int64_t first = begin & ~int64_t{15};
  for (int64_t at = first + lane * 16; at < end; at += kWarp * 16) {
    uint4* to = segment + (at - first) / 16;
    if (at + 16 <= matrix_end) {
      copy_async(to, w.weight + at);
    } else {
      for (int i = 0; at + 2 * i < matrix_end; ++i)
        reinterpret_cast<uint16_t*>(to)[i] = reinterpret_cast<const uint16_t*>(w.weight + at)[i];
    }
  }
}

template <class Row, int kTokens>
__global__ void __launch_bounds__(Block<kTokens>::kWarps* kWarp, 2)
    dense_few_kernel(Matrix w, const float* __restrict__ bias, const float* __restrict__ x, int n,
                     float* __restrict__ y) {
  constexpr int kRows = Block<kTokens>::kRows, kWarps = Block<kTokens>::kWarps, kSegments = Block<kTokens>::kSegments;
  constexpr int kColumns = Row::kColumns, kStep = kWarp * kColumns;
  constexpr int kSteps = kWarpSegmentBytes / kRows / Row::kStepBytes / 2 * 2;
  static_assert(kSteps * Row::kStepBytes % 16 == 0);  // a row begins in each segment where it did in the first
  constexpr int kSegmentWords = kSteps * Row::kStepBytes / 16 + 2;  // 16 bytes; more where rows begin inside a word
  __shared__ uint4 shared[kWarps][kSegments][kRows][kSegmentWords];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_row = (int64_t{blockIdx.x} * kWarps + warp) * kRows;

  int64_t row_begin[kRows];  // past the last row: that one again
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    row_begin[r] = (first_row + r < w.out_features ? first_row + r : w.out_features - 1) * w.row_bytes;
  const auto copy = [&](int segment) {
    const int64_t begin = int64_t{segment} * (kSteps * Row::kStepBytes);
    const int64_t end = begin + kSteps * Row::kStepBytes;
    if (begin < w.row_bytes)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        copy_segment(w, row_begin[r] + begin, row_begin[r] + (end < w.row_bytes ? end : w.row_bytes), lane,
                     shared[warp][segment % kSegments][r]);
    commit_copies();
  };

  static_assert(Row::kStepBytes % 4 == 0);
  const auto row_of = [&](int r) { return Row(static_cast<uint32_t>(row_begin[r] % 16), lane); };
  float sum[kTokens][kRows] = {};
  const int n_segments = (w.in_features + kSteps * kStep - 1) / (kSteps * kStep);
  for (int s = 0; s < kSegments - 1; ++s) copy(s);
  for (int s = 0; s < n_segments; ++s) {
    wait_copies<kSegments - 2>();
    sync_block();  // this segment is there for all lanes, and they have done with the one before it
    copy(s + kSegments - 1);
#pragma unroll 2
    for (int step = 0; step < kSteps; ++step) {
      const int column = (s * kSteps + step) * kStep + lane * kColumns;
      if (column >= w.in_features) break;
      float xs[kTokens][kColumns], ws[kRows][kColumns];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float* xt = x + int64_t{t < n ? t : n - 1} * w.in_features + column;
        if constexpr (kColumns == 4) {
          const float4 four = *reinterpret_cast<const float4*>(xt);
          xs[t][0] = four.x, xs[t][1] = four.y, xs[t][2] = four.z, xs[t][3] = four.w;
        } else {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) xs[t][i] = column + i < w.in_features ? xt[i] : 0.0f;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto* segment = reinterpret_cast<const uint32_t*>(shared[warp][s % kSegments][r]);
        row_of(r).load(segment + step * (Row::kStepBytes / 4), ws[r]);
        if (kColumns == 2 && column + 1 >= w.in_features) ws[r][kColumns - 1] = 0;  // the next row's
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
          for (int i = 0; i < kColumns; ++i) sum[t][r] = fmaf(xs[t][i], ws[r][i], sum[t][r]);
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kTokens; ++t)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) sum[t][r] += shuffle_xor(sum[t][r], mask);
      const int64_t row = first_row + r;
      if (lane == r && t < n && row < w.out_features)
        y[int64_t{t} * w.out_features + row] = bias ? sum[t][r] + bias[row] : sum[t][r];
    }
}

template <class Row, int kTokens>
void run(const Matrix& w, const float* bias, const float* x, int n, float* y, Stream stream) {
  using B = Block<kTokens>;
  constexpr int kBlockRows = B::kWarps * B::kRows;
  const auto blocks = static_cast<unsigned>((w.out_features + kBlockRows - 1) / kBlockRows);
  launch(dense_few_kernel<Row, kTokens>, {dim3(blocks), dim3(B::kWarps * kWarp)}, stream, w, bias, x, n, y);
}

template <class Row>
void run(const DenseLayer& layer, const float* x, int n, float* y, Stream stream) {
  const auto row_bytes = static_cast<int64_t>(bytes_of(layer.type, layer.in_features));
  const Matrix w{layer.weight, row_bytes, layer.in_features, layer.out_features};
  for (int t = 0; t < n; t += kFewTokens) {
    const int tokens = n - t < kFewTokens ? n - t : kFewTokens;
    const auto kernel = tokens == 1 ? run<Row, 1> : tokens == 2 ? run<Row, 2> : tokens <= 4 ? run<Row, 4> : run<Row, 8>;
    kernel(w, layer.bias, x + int64_t{t} * layer.in_features, tokens, y + int64_t{t} * layer.out_features, stream);
  }
}

}  // namespace

void dense_few(const DenseLayer& w, const float* x, int n, float* y, Stream stream) {
  with_matrix_type(w.type, [&]<DType Type>() { run<DenseRow<Type>>(w, x, n, y, stream); });
}

}  // namespace vptq::cuda
