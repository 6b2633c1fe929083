// A vector-quantised matrix times the activations of many tokens.
//
// Vectors lie along the outputs, so a tile of weights is kept column by column: a lookup is one store. A vector is
// looked up in pieces of 8, 4, 2 or 1, the largest that divides its length: then no vector length needs a kernel of its
// own, and a piece never crosses the border of a tile. Outliers are looked up one by one.
#include "cuda/kernels/gemm.cuh"

namespace vptq::cuda {
namespace {

// kPiece numbers of a centroid as they lie in memory.
template <DType kType, int kPiece>
struct Piece {
  static constexpr int kElementBytes = kType == DType::f32 ? 4 : 2, kBytes = kPiece * kElementBytes;
  uint32_t words[(kBytes + 3) / 4];

  VPTQ_DEVICE void load(const std::byte* from) {
    if constexpr (kBytes == 2) {
      words[0] = *reinterpret_cast<const uint16_t*>(from);
    } else if constexpr (kBytes == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kBytes == 8) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      words[0] = two.x, words[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 4; i += 4) {
        const uint4 four = reinterpret_cast<const uint4*>(from)[i / 4];
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
  }
  // Numbers 2 i and 2 i + 1.
  VPTQ_DEVICE float2 floats(int i) const {
    if constexpr (kType == DType::f32)
      return make_float2(float_from_bits(words[2 * i]), float_from_bits(words[lesser(2 * i + 1, kPiece - 1)]));
    else
      return make_float2(float_from_bits(words[i] << 16), float_from_bits(words[i] & 0xffff0000u));
  }
};

// Two weights in f16, of numbers 2 i and 2 i + 1.
template <DType kType, int kPiece>
VPTQ_DEVICE uint32_t weights(const Piece<kType, kPiece>& main, const Piece<kType, kPiece>& residual, bool has_residual,
                             int i) {
  if constexpr (kType == DType::f16) {
    return has_residual ? add_halves(main.words[i], residual.words[i]) : main.words[i];
  } else {
    float2 sum = main.floats(i);
    if (has_residual) {
      const float2 more = residual.floats(i);
      sum = make_float2(sum.x + more.x, sum.y + more.y);
    }
    return floats_to_halves(sum.x * kWeightFactor, sum.y * kWeightFactor);
  }
}

template <int kPiece>
VPTQ_DEVICE void store_piece(const uint32_t (&words)[(kPiece + 1) / 2], uint16_t* to) {
  if constexpr (kPiece == 8)
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  else if constexpr (kPiece == 4)
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  else if constexpr (kPiece == 2)
    *reinterpret_cast<uint32_t*>(to) = words[0];
  else
    *to = static_cast<uint16_t>(words[0]);
}

// A lane has one column of each step and some pieces of that. Eight lanes beside each other have eight columns of a row
// of pieces: 272 bytes from column to column put their stores into different banks, and pieces of the same vector are
// loaded by the same instruction. Past the last column it is that one again, whose x is zero there.
template <class T, DType kType, int kPiece>
class VqTile {
 public:
  using Source = VqColumns;
  static constexpr bool kColumnMajor = true;
  static constexpr int kStride = T::kOutputs + 8, kElements = kStepColumns * kStride;

  VPTQ_DEVICE VqTile(const VqColumns& c, int, int first_output) : c_(c), first_block_(first_output / c.v) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int column = warp % 4 * 8 + lane % 8, piece = warp / 4 * 4 + lane / 8;
    j_ = column;
    enter_group();
    put_at_ = column * kStride + piece * kPiece;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int element = first_output % c.v + (piece + i * T::kWarps) * kPiece;
      const int block = lesser(element / c.v, c.n_blocks - 1 - first_block_);  // past the last output: any
      place_[i] = block * kMaxVectorLength + element % c.v;
    }
  }

  // Loads packed indices.
  VPTQ_DEVICE void ask() {
    const int bits = c_.index_bits + c_.res_bits;
    const bool halves = kPiece == 1 && bits == 16;  // the rows of outliers are aligned to no more
    const uint64_t bit = uint64_t{static_cast<uint32_t>(j_)} * static_cast<uint32_t>(bits);
    const std::byte* at = rows_ + (halves ? bit / 8 : bit / 32 * 4);
    shift_ = halves ? 0 : static_cast<int>(bit % 32);
    const bool both = shift_ + bits > 32;  // else the second word's bits are not looked at
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const std::byte* p = at + uint64_t{place_[i] / kMaxVectorLength} * static_cast<uint32_t>(c_.row_bytes);
      packed_[i][0] = halves ? *reinterpret_cast<const uint16_t*>(p) : *reinterpret_cast<const uint32_t*>(p);
      if (both) packed_[i][1] = reinterpret_cast<const uint32_t*>(p)[1];
    }
  }

  // Loads the centroids.
  VPTQ_DEVICE void fetch() {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const auto value = static_cast<uint32_t>((uint64_t{packed_[i][1]} << 32 | packed_[i][0]) >> shift_);
      const uint32_t element = place_[i] % kMaxVectorLength;
      const uint32_t at = (value & mask(c_.index_bits)) * c_.v + element;
      main_[i].load(centroids_ + uint64_t{at} * main_[i].kElementBytes);
      if (c_.r) {
        const uint32_t res_at = (value >> c_.index_bits & mask(c_.res_bits)) * c_.v + element;
        residual_[i].load(res_centroids_ + uint64_t{res_at} * main_[i].kElementBytes);
      }
    }
    j_ += kStepColumns;
    if (j_ >= c_.group_size) enter_group();
  }

  // Stores the weights that were fetched.
  VPTQ_DEVICE void put(uint16_t* tile) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      uint32_t words[(kPiece + 1) / 2];
#pragma unroll
      for (int j = 0; j < (kPiece + 1) / 2; ++j) words[j] = weights(main_[i], residual_[i], c_.r > 0, j);
      store_piece<kPiece>(words, tile + put_at_ + i * T::kWarps * kPiece);
    }
  }

 private:
  static constexpr int kItems = T::kOutputs * kStepColumns / T::kThreads / kPiece;  // pieces a lane

  VPTQ_DEVICE static uint32_t mask(int bits) { return (1u << bits) - 1; }  // of a centroid's index: at most 16

  // Column j_ of the group may lie in one of the next.
  VPTQ_DEVICE void enter_group() {
    while (j_ >= c_.group_size && group_ + 1 < c_.n_groups) {
      j_ -= c_.group_size;
      ++group_;
    }
    j_ = lesser(j_, c_.group_size - 1);
    const int64_t group = group_;
    rows_ = c_.indices + (group * c_.n_blocks + first_block_) * c_.row_bytes;
    centroids_ = c_.centroids + group * c_.k * c_.v * main_[0].kElementBytes;
    res_centroids_ = c_.res_centroids + group * c_.r * c_.v * main_[0].kElementBytes;
  }

  const VqColumns& c_;
  const int first_block_;
  int group_ = 0, j_;                                    // the column to ask for next
  const std::byte *rows_, *centroids_, *res_centroids_;  // of its group
  int shift_;                                            // of what was asked for
  int put_at_;                                           // elements from the tile's first
  uint32_t place_[kItems];  // kMaxVectorLength times the block, counted from the tile's first, and the first element
  uint32_t packed_[kItems][2] = {};
  Piece<kType, kPiece> main_[kItems], residual_[kItems];
};

template <DType kType, int kPiece>
void run(const VqColumns& c, const Product& p, Stream stream) {
  if constexpr (kPiece > 1 && kType != DType::f32) {  // what models have
    if (suits<LargeTile>(p)) return gemm<LargeTile, VqTile<LargeTile, kType, kPiece>>(c, p, stream);
    if (suits<MediumTile>(p)) return gemm<MediumTile, VqTile<MediumTile, kType, kPiece>>(c, p, stream);
  }
  gemm<SmallTile, VqTile<SmallTile, kType, kPiece>>(c, p, stream);
}

template <DType kType>
void run(const VqColumns& c, const Product& p, Stream stream) {
  const auto kernel = !p.finish || c.v % 2 ? run<kType, 1>  // outliers are few
                      : c.v % 8 == 0       ? run<kType, 8>
                      : c.v % 4 == 0       ? run<kType, 4>
                                           : run<kType, 2>;
  kernel(c, p, stream);
}

}  // namespace

void vq_many(const VqLayer& w, const float* x, int n, float* y, void* workspace, Stream stream) {
  const HalfActivations activations = prepare_activations(w, x, n, workspace, stream);
  for (int part = 0; part < w.n_columns; ++part) {
    const VqColumns& c = w.columns[part];
    const bool last = part + 1 == w.n_columns;
    const Product p{.x = activations,
                    .first_column = last ? activations.main_column : 0,
                    .n_columns = c.n_groups * c.group_size,
                    .layer = w,
                    .weight_inverse = c.type == DType::f16 ? 1 : 1 / kWeightFactor,
                    .accumulate = part > 0,
                    .finish = last,
                    .y = y};
    const auto kernel = c.type == DType::f16    ? run<DType::f16>
                        : c.type == DType::bf16 ? run<DType::bf16>
                                                : run<DType::f32>;
    kernel(c, p, stream);
  }
}

}  // namespace vptq::cuda
