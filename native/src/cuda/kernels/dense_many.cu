// A dense matrix times the activations of many tokens: its weights are rounded to f16 on the way.
#include "cuda/kernels/gemm.cuh"
#include "cuda/kernels/quantised.cuh"

namespace vptq::cuda {
namespace {

// Two weights of a row, beginning at an even column: load() leaves them as they lie in memory, halves() makes f16 of
// them. `both`: the second is inside the row.
template <DType Type>
struct DensePair;
template <>
struct DensePair<DType::f32> {
  float first, second;
  VPTQ_DEVICE void load(const std::byte* row, int column, bool both, bool) {
    const float* p = reinterpret_cast<const float*>(row) + column;
    first = p[0];
    second = both ? p[1] : 0;
  }
  VPTQ_DEVICE uint32_t halves() const { return floats_to_halves(first * kWeightFactor, second * kWeightFactor); }
};
template <>
struct DensePair<DType::f16> {
  uint32_t pair;
  VPTQ_DEVICE void load(const std::byte* row, int column, bool both, bool aligned) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + column;
    if (aligned)
      pair = *reinterpret_cast<const uint32_t*>(p);
    else
      pair = p[0] | (both ? uint32_t{p[1]} << 16 : 0);
  }
  VPTQ_DEVICE uint32_t halves() const { return pair; }
};
template <>
struct DensePair<DType::bf16> : DensePair<DType::f16> {
  VPTQ_DEVICE uint32_t halves() const {
    return floats_to_halves(float_from_bits(pair << 16) * kWeightFactor,
                            float_from_bits(pair & 0xffff0000u) * kWeightFactor);
  }
};
template <>
struct DensePair<DType::q8_0> {
  uint16_t scale, pair;
  VPTQ_DEVICE void load(const std::byte* row, int column, bool, bool) {
    const std::byte* block = row + int64_t{column} / kQ8Block * kQ8BlockBytes;
    scale = *reinterpret_cast<const uint16_t*>(block);
    pair = *reinterpret_cast<const uint16_t*>(block + 2 + column % kQ8Block);
  }
  VPTQ_DEVICE uint32_t halves() const {
    const float d = half_to_float(scale) * kWeightFactor;
    return floats_to_halves(static_cast<int8_t>(pair & 0xff) * d, static_cast<int8_t>(pair >> 8) * d);
  }
};
template <DType Type>
struct PackedPair {
  float first, second;
  VPTQ_DEVICE void load(const std::byte* row, int column, bool, bool) {
    first = packed_weight<Type>(row, column);
    second = packed_weight<Type>(row, column + 1);
  }
  VPTQ_DEVICE uint32_t halves() const { return floats_to_halves(first * kWeightFactor, second * kWeightFactor); }
};
template <>
struct DensePair<DType::q4_0> : PackedPair<DType::q4_0> {};
template <>
struct DensePair<DType::q4_1> : PackedPair<DType::q4_1> {};
template <>
struct DensePair<DType::q5_0> : PackedPair<DType::q5_0> {};
template <>
struct DensePair<DType::q5_1> : PackedPair<DType::q5_1> {};

struct DenseSource {
  const std::byte* weight;
  int64_t row_bytes;
  int in_features;
};

// A tile of weights is kept row by row. Sixteen lanes beside each other load a row's step, a pair each.
template <class T, class Pair>
class DenseTile {
 public:
  using Source = DenseSource;
  static constexpr bool kColumnMajor = false;
  static constexpr int kStride = kStepStride, kElements = T::kOutputs * kStride;

  VPTQ_DEVICE DenseTile(const DenseSource& w, int out_features, int first_output)
      : w_(w),
        rows_(w.weight + first_output * w.row_bytes),
        column_(threadIdx.x % kLanes * 2),
        row_(threadIdx.x / kLanes),
        last_row_(lesser(T::kOutputs, out_features - first_output) - 1) {}

  VPTQ_DEVICE void ask() {}
  VPTQ_DEVICE void fetch() {
    there_ = column_ < w_.in_features;
    if (there_)
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        pairs_[i].load(rows_ + lesser(row_ + i * kRowStep, last_row_) * w_.row_bytes, column_,
                       column_ + 1 < w_.in_features, w_.in_features % 2 == 0);
    column_ += kStepColumns;
  }
  VPTQ_DEVICE void put(uint16_t* tile) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      *reinterpret_cast<uint32_t*>(tile + (row_ + i * kRowStep) * kStride + threadIdx.x % kLanes * 2) =
          there_ ? pairs_[i].halves() : 0;
  }

 private:
  static constexpr int kLanes = kStepColumns / 2;        // a row
  static constexpr int kRowStep = T::kThreads / kLanes;  // from one row of a lane to its next
  static constexpr int kPairs = T::kOutputs / kRowStep;

  const DenseSource& w_;
  const std::byte* rows_;
  int column_;          // of the next pairs
  const int row_;       // of the tile
  const int last_row_;  // of the tile's; those past it are that one again
  bool there_;
  Pair pairs_[kPairs];
};

template <class Pair>
void run(const DenseSource& w, const Product& p, Stream stream) {
  if (suits<LargeTile>(p))
    gemm<LargeTile, DenseTile<LargeTile, Pair>>(w, p, stream);
  else
    gemm<SmallTile, DenseTile<SmallTile, Pair>>(w, p, stream);
}

}  // namespace

void dense_many(const DenseLayer& w, const float* x, int n, float* y, void* workspace, Stream stream) {
  VqLayer layer{};  // without norms
  layer.in_features = w.in_features;
  layer.out_features = w.out_features;
  layer.bias = w.bias;
  const Product p{.x = prepare_activations(layer, x, n, workspace, stream),
                  .first_column = 0,
                  .n_columns = w.in_features,
                  .layer = layer,
                  .weight_inverse = w.type == DType::f16 ? 1 : 1 / kWeightFactor,
                  .accumulate = false,
                  .finish = true,
                  .y = y};
  const DenseSource source{w.weight, static_cast<int64_t>(bytes_of(w.type, w.in_features)), w.in_features};
  with_matrix_type(w.type, [&]<DType Type>() { run<DensePair<Type>>(source, p, stream); });
}

}  // namespace vptq::cuda
