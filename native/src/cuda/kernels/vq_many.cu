// A vector-quantised matrix times the activations of many tokens.
//
// Vectors lie along the outputs, so a tile of weights is kept column by column: a lookup is one store. A vector is
// looked up in pieces of 8, 4, 2 or 1, the largest that divides its length: then no vector length needs a kernel of its
// own, and a piece never crosses the border of a tile.
#include "cuda/kernels/gemm.cuh"

namespace vptq::cuda {
namespace {

// kPiece f16 or bf16.
template <int kPiece>
VPTQ_DEVICE void load_piece(const std::byte* from, uint32_t (&words)[(kPiece + 1) / 2]) {
  if constexpr (kPiece == 8) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else if constexpr (kPiece == 4) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    words[0] = two.x, words[1] = two.y;
  } else if constexpr (kPiece == 2) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
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

VPTQ_DEVICE float2 bf16s_to_floats(uint32_t pair) {
  return make_float2(float_from_bits(pair << 16), float_from_bits(pair & 0xffff0000u));
}

// A lane has one column of a step and some pieces of that. Eight lanes beside each other have eight columns of a row of
// pieces: 272 bytes from column to column put their stores into different banks, and pieces of the same vector are
// loaded by the same instruction.
template <class T, int kPiece>
class VqTile {
 public:
  using Source = VqColumns;
  static constexpr bool kColumnMajor = true;
  static constexpr int kStride = T::kOutputs + 8, kElements = kStepColumns * kStride;

  VPTQ_DEVICE VqTile(const VqColumns& c, int, int first_output) : c_(c), first_block_(first_output / c.v) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    column_ = warp % 4 * 8 + lane % 8;
    first_piece_ = warp / 4 * 4 + lane / 8;
    const int first_element = first_output % c.v;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int element = first_element + (first_piece_ + i * kPieceStep) * kPiece;
      const int block = lesser(element / c.v, c.n_blocks - 1 - first_block_);  // past the last output: any
      place_[i] = block * kMaxVectorLength + element % c.v;
    }
  }

  // Loads the packed indices.
  VPTQ_DEVICE void ask(int step) {
    const Column at = column(step);
    if (!at.there) return;
    const int bits = c_.index_bits + c_.res_bits;
    const int64_t bit = int64_t{at.j} * bits;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t block = int64_t{at.group} * c_.n_blocks + first_block_ + place_[i] / kMaxVectorLength;
      const std::byte* row = c_.indices + block * c_.row_bytes;
      if (bits == 16) {
        packed_[i][0] = reinterpret_cast<const uint16_t*>(row)[at.j];
      } else {  // rows of words: outliers have 16 bits
        const uint32_t* words = reinterpret_cast<const uint32_t*>(row) + bit / 32;
        packed_[i][0] = words[0];
        packed_[i][1] = bit % 32 + bits > 32 ? words[1] : 0;
      }
    }
  }

  // Loads the centroids.
  VPTQ_DEVICE void fetch(int step) {
    const Column at = column(step);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!at.there) {
#pragma unroll
        for (int word = 0; word < kWords; ++word) main_[i][word] = residual_[i][word] = 0;
        continue;
      }
      const int bits = c_.index_bits + c_.res_bits;
      const int shift = bits == 16 ? 0 : static_cast<int>(int64_t{at.j} * bits % 32);
      const auto value = static_cast<uint32_t>((uint64_t{packed_[i][1]} << 32 | packed_[i][0]) >> shift);
      const int64_t index = int64_t{at.group} * c_.k + (value & index_mask(c_.index_bits));
      const int64_t res_index = int64_t{at.group} * c_.r + (value >> c_.index_bits & index_mask(c_.res_bits));
      const int element = place_[i] % kMaxVectorLength;
      if (c_.type == DType::f32) {
        fetch_floats(index * c_.v + element, res_index * c_.v + element, main_[i]);
      } else {
        load_piece<kPiece>(c_.centroids + 2 * (index * c_.v + element), main_[i]);
        if (c_.r) load_piece<kPiece>(c_.res_centroids + 2 * (res_index * c_.v + element), residual_[i]);
      }
    }
  }

  // Stores the weights in f16.
  VPTQ_DEVICE void put(uint16_t* tile) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        uint32_t& w = main_[i][word];
        if (c_.type == DType::f16) {
          if (c_.r) w = add_halves(w, residual_[i][word]);
        } else if (c_.type == DType::bf16) {
          float2 sum = bf16s_to_floats(w);
          if (c_.r) {
            const float2 residual = bf16s_to_floats(residual_[i][word]);
            sum = make_float2(sum.x + residual.x, sum.y + residual.y);
          }
          w = floats_to_halves(sum.x * kWeightFactor, sum.y * kWeightFactor);
        }
      }
      store_piece<kPiece>(main_[i], tile + column_ * kStride + (first_piece_ + i * kPieceStep) * kPiece);
    }
  }

 private:
  static constexpr int kItems = T::kOutputs * kStepColumns / T::kThreads / kPiece;  // pieces a lane
  static constexpr int kPieceStep = T::kWarps / 4 * 4;                              // from one to its next
  static constexpr int kWords = (kPiece + 1) / 2;

  struct Column {
    bool there;
    int group, j;
  };
  VPTQ_DEVICE Column column(int step) const {
    const int c = step * kStepColumns + column_;
    const int group = c_.n_groups == 1 ? 0 : c / c_.group_size;
    return {group < c_.n_groups && c < c_.n_groups * c_.group_size, group, c - group * c_.group_size};
  }

  // Rare, and slow: the loads are waited for at once.
  VPTQ_DEVICE void fetch_floats(int64_t first, int64_t res_first, uint32_t (&words)[kWords]) {
    const float* main = reinterpret_cast<const float*>(c_.centroids) + first;
    const float* residual = reinterpret_cast<const float*>(c_.res_centroids) + res_first;
    const auto weight = [&](int i) { return (c_.r ? main[i] + residual[i] : main[i]) * kWeightFactor; };
#pragma unroll
    for (int word = 0; word < kWords; ++word)
      words[word] = floats_to_halves(weight(2 * word), 2 * word + 1 < kPiece ? weight(2 * word + 1) : 0);
  }

  const VqColumns& c_;
  const int first_block_;
  int column_, first_piece_;
  uint32_t place_[kItems];  // kMaxVectorLength times the block, counted from the tile's first, and the first element
  uint32_t packed_[kItems][2] = {};
  uint32_t main_[kItems][kWords], residual_[kItems][kWords];
};

template <int kPiece>
void run(const VqColumns& c, const Product& p, Stream stream) {
  // Single weights are rare, and so many that their places do not fit beside the sums of a large tile.
  if constexpr (kPiece > 1)
    if (count_tiles<LargeTile>(p) >= kEnoughTiles) return gemm<LargeTile, VqTile<LargeTile, kPiece>>(c, p, stream);
  gemm<SmallTile, VqTile<SmallTile, kPiece>>(c, p, stream);
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
    const auto kernel = c.v % 8 == 0 ? run<8> : c.v % 4 == 0 ? run<4> : c.v % 2 == 0 ? run<2> : run<1>;
    kernel(c, p, stream);
  }
}

}  // namespace vptq::cuda
