// Columns of a vector-quantised matrix times many tokens' activations. Included inside an anonymous namespace, after
// codebook.h.
//
// The weights of a tile, kTileColumns columns of some blocks, are looked up once and multiplied with all tokens: in
// float32, or in 16-bit integers, as i16.h has it.

constexpr int kTileTokens = 128;  // whose sums are kept while a tile is there

// The blocks of a tile, so that its rows fill whole vectors: 64 rows, or 48.
constexpr int tile_blocks(int v) { return v == 2 ? 32 : v == 4 ? 16 : v <= 8 ? 8 : 4; }

int rows_at_a_time(int v) { return tile_blocks(v) * v; }

// Calls multiply<T, P>(t, row) for all tokens and all vectors of Rows rows, P vectors and T tokens at a time: as many
// sums as fit the registers.
template <int Rows, class Multiply>
[[gnu::always_inline]] inline void share_registers(int n_tokens, Multiply multiply) {
  constexpr int kVectors = Rows / kVector;
  constexpr int P = kVectors % kWeightVectors == 0 ? kWeightVectors : 3;
  constexpr int T = kSumVectors / P;
  static_assert(kVectors % P == 0 && T >= 2);
  for (int row = 0; row < Rows; row += P * kVector) {
    int t = 0;
    for (; t + T <= n_tokens; t += T) multiply.template operator()<T, P>(t, row);
    for (; t + 2 <= n_tokens; t += 2) multiply.template operator()<2, P>(t, row);
    if (t < n_tokens) multiply.template operator()<1, P>(t, row);
  }
}

// Activations in float32 (n_tokens, stride), from the first of the columns on.
struct F32Activations {
  const float* x;
  int64_t stride;

  F32Activations from(int t) const { return {x + t * stride, stride}; }

  // sums[t][row] += sum_j x[t][group begin + j0 + j] w[j][row] over n columns
  template <int Rows, class LookUp>
  void multiply(const VqColumns& c, int group, int j0, int n, int n_tokens, LookUp look_up, float (*sums)[Rows]) const {
    constexpr int kLooked = 32;  // columns: their floats lie in L1 beside the codebook
    alignas(64) float tile[kLooked][Rows];
    for (int j = 0; j < n; j += kLooked) {
      const int looked = n - j < kLooked ? n - j : kLooked;
      look_up(j, j + looked, tile);
      multiply_looked_up<Rows>(x + int64_t{group} * c.group_size + j0 + j, looked, n_tokens, tile, sums);
    }
  }

 private:
  template <int Rows>
  void multiply_looked_up(const float* xs, int n, int n_tokens, const float (*tile)[Rows], float (*sums)[Rows]) const {
    share_registers<Rows>(n_tokens, [&]<int T, int P>(int t0, int row) {
      using L = Lanes<kVector>;
      L acc[T][P];
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < P; ++i) acc[t][i] = L::load(sums[t0 + t] + row + i * kVector);
      for (int j = 0; j < n; ++j) {
        L w[P];
        for (int i = 0; i < P; ++i) w[i] = L::load(tile[j] + row + i * kVector);
        for (int t = 0; t < T; ++t) {
          const L xj = L::broadcast(xs[(t0 + t) * stride + j]);
          for (int i = 0; i < P; ++i) acc[t][i] = fma(xj, w[i], acc[t][i]);
        }
      }
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < P; ++i) acc[t][i].store(sums[t0 + t] + row + i * kVector);
    });
  }
};

// The blocks whose weights are looked up side by side: as many as leave no gaps between their rows.
template <int V, bool Gaps = (Blocks<V>::kStride > V)>
struct GaplessBlocks : Blocks<V> {};
template <int V>
struct GaplessBlocks<V, true> : Block<V> {};

// Up to kTileTokens tokens, up to tile_blocks(V) blocks. X: F32Activations or I16Activations
template <class X, int V, class Centroids, bool Residual>
void vq_tile_rows(const VqColumns& c, const X& x, int n_tokens, int block, int n_blocks, int row_end, bool accumulate,
                  float* y, int64_t y_stride) {
  constexpr int kBlocks = tile_blocks(V), kRows = kBlocks * V;
  alignas(64) float sums[kTileTokens][kRows];
  Offsets<Residual> offsets[kBlocks];
  static_assert(sizeof(sums) + sizeof(offsets) <= 72 << 10, "threads may have stacks of 128 KiB");
  const Unpacker unpack(c.index_bits + c.res_bits);
  __builtin_memset(sums, 0, sizeof(sums[0]) * size_t(n_tokens));
  for (int q = 0; q < c.n_groups; ++q) {
    const Codebook<V, Centroids, Residual> codebook(c, q);
    for (int j0 = 0; j0 < c.group_size; j0 += kTileColumns) {
      const int n = c.group_size - j0 < kTileColumns ? c.group_size - j0 : kTileColumns;
      codebook.find(unpack, c, q, block, n_blocks, j0, n, offsets);
      // The weights of the tile's columns [begin, end), rows side by side.
      const auto look_up = [&](int begin, int end, float (*w)[kRows]) {
        using B = GaplessBlocks<V>;
        for (int b = 0; b < kBlocks; b += B::kCount)
          for (int j = begin; j < end; ++j) codebook.template look_up<B>(offsets + b, j).store(w[j - begin] + b * V);
      };
      x.template multiply<kRows>(c, q, j0, n, n_tokens, look_up, sums);
    }
  }
  for (int t = 0; t < n_tokens; ++t)
    for (int b = 0; b < n_blocks; ++b) put<V>(sums[t] + b * V, block + b, row_end, accumulate, y + t * y_stride);
}

template <class X, int V, class Centroids, bool Residual>
void vq_many(const VqColumns& c, const X& x, int n_tokens, int first_block, int end_block, int row_end, bool accumulate,
             float* y, int64_t y_stride) {
  for (int t = 0; t < n_tokens; t += kTileTokens) {
    const int tokens = n_tokens - t < kTileTokens ? n_tokens - t : kTileTokens;
    for (int block = first_block; block < end_block; block += tile_blocks(V)) {
      const int blocks = end_block - block < tile_blocks(V) ? end_block - block : tile_blocks(V);
      vq_tile_rows<X, V, Centroids, Residual>(c, x.from(t), tokens, block, blocks, row_end, accumulate,
                                              y + t * y_stride, y_stride);
    }
  }
}
