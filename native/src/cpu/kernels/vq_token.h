// Columns of a vector-quantised matrix times one token's activations. Included inside an anonymous namespace, after
// codebook.h.
//
// The weights go from the codebook to the sums through registers, column by column.

constexpr int kTokenVectors = 4;  // of sums, that share the loads of x

// R vectors of sums, over n_blocks blocks. Inlined by force: in a loop GCC unrolls all that is done over an array of
// sums and so keeps it in registers; elsewhere not always, and where it takes instructions for calls that may read any
// memory (NEON, AVX-512's masks), it then stores the sums in every column.
template <int R, int V, class Centroids, bool Residual>
[[gnu::always_inline]] inline void vq_token_blocks(const VqColumns& c, const float* x, int block, int n_blocks,
                                                   int row_end, bool accumulate, float* y) {
  using B = Blocks<V>;
  using Sums = typename B::Sums;
  constexpr int kBlocks = R * B::kCount;
  Offsets<Residual> offsets[kBlocks];
  const Unpacker unpack(c.index_bits + c.res_bits);
  Sums acc[R];
  for (auto& a : acc) a = Sums::broadcast(0);
  for (int q = 0; q < c.n_groups; ++q) {
    const Codebook<V, Centroids, Residual> codebook(c, q);
    const float* xq = x + c.first_column + q * c.group_size;
    for (int j0 = 0; j0 < c.group_size; j0 += kTileColumns) {
      const int n = c.group_size - j0 < kTileColumns ? c.group_size - j0 : kTileColumns;
      for (int b = 0; b < kBlocks; ++b) {
        const int there = block + (b < n_blocks ? b : n_blocks - 1);  // the last one again, where there are not so many
        codebook.find(unpack, index_row(c, q, there), c.row_bytes, j0, n, offsets[b]);
        prefetch_indices(c, q, there, j0, n, kBlocks);
      }
      for (int j = 0; j < n; ++j) {
        const Sums xj = Sums::broadcast(xq[j0 + j]);
        for (int i = 0; i < R; ++i) acc[i] = fma(xj, codebook.template look_up<B>(offsets + i * B::kCount, j), acc[i]);
      }
    }
  }
  float sums[kBlocks * B::kStride];
  for (int i = 0; i < R; ++i) acc[i].store(sums + i * B::kCount * B::kStride);
  for (int b = 0; b < n_blocks; ++b) put<V>(sums + b * B::kStride + B::kFirst, block + b, row_end, accumulate, y);
}

template <int V, class Centroids, bool Residual>
void vq_token(const VqColumns& c, const float* x, int block, int end_block, int row_end, bool accumulate, float* y) {
  constexpr int kOne = Blocks<V>::kCount, kMany = kTokenVectors * kOne;
  for (; block + kMany <= end_block; block += kMany)
    vq_token_blocks<kTokenVectors, V, Centroids, Residual>(c, x, block, kMany, row_end, accumulate, y);
  for (; block < end_block; block += kOne) {
    const int n = end_block - block < kOne ? end_block - block : kOne;
    vq_token_blocks<1, V, Centroids, Residual>(c, x, block, n, row_end, accumulate, y);
  }
}
