// Columns of a vector-quantised matrix times one token's activations, or those of a few. Included inside an anonymous
// namespace, after codebook.h.
//
// The weights go from the codebook to the sums through registers, column by column.

// Vectors of sums a token, that share the loads of x: fewer where many tokens share a lookup.
constexpr int few_vectors(int n_tokens) { return n_tokens > 6 ? 3 : 4; }

// Tokens that share a lookup: as many as the registers have sums for. One, where centroids are not in f16: that is
// rare, and each number of tokens is a kernel of its own to compile.
template <class Centroids>
constexpr int kFewTokens = 1;
template <>
constexpr int kFewTokens<F16Centroids> = kSumVectors >= 8 * few_vectors(8) ? 8 : kSumVectors / few_vectors(1);

// T tokens, R vectors of sums each, over n_blocks blocks. Inlined by force: in a loop GCC unrolls all that is done over
// an array of sums and so keeps it in registers; elsewhere not always, and where it takes instructions for calls that
// may read any memory (NEON, AVX-512's masks), it then stores the sums in every column.
template <int T, int R, int V, class Centroids, bool Residual>
[[gnu::always_inline]] inline void vq_few_blocks(const VqColumns& c, const float* x, int64_t x_stride, int block,
                                                 int n_blocks, int row_end, bool accumulate, float* y,
                                                 int64_t y_stride) {
  using B = Blocks<V>;
  using Sums = typename B::Sums;
  constexpr int kBlocks = R * B::kCount;
  Offsets<Residual> offsets[kBlocks];
  const Unpacker unpack(c.index_bits + c.res_bits);
  Sums acc[T][R];
  for (auto& sums : acc)
    for (auto& a : sums) a = Sums::broadcast(0);
  for (int q = 0; q < c.n_groups; ++q) {
    const Codebook<V, Centroids, Residual> codebook(c, q);
    const float* xq = x + int64_t{q} * c.group_size;
    for (int j0 = 0; j0 < c.group_size; j0 += kTileColumns) {
      const int n = c.group_size - j0 < kTileColumns ? c.group_size - j0 : kTileColumns;
      codebook.find(unpack, c, q, block, n_blocks, j0, n, offsets);
      for (int j = 0; j < n; ++j) {
        Sums xj[T];
        for (int t = 0; t < T; ++t) xj[t] = Sums::broadcast(xq[t * x_stride + j0 + j]);
        for (int i = 0; i < R; ++i) {
          const Sums w = codebook.template look_up<B>(offsets + i * B::kCount, j);
          for (int t = 0; t < T; ++t) acc[t][i] = fma(xj[t], w, acc[t][i]);
        }
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    float sums[kBlocks * B::kStride];
    for (int i = 0; i < R; ++i) acc[t][i].store(sums + i * B::kCount * B::kStride);
    for (int b = 0; b < n_blocks; ++b)
      put<V>(sums + b * B::kStride + B::kFirst, block + b, row_end, accumulate, y + t * y_stride);
  }
}

// x (n_tokens, x_stride), from the first of the columns on; at most T tokens.
template <int T, int V, class Centroids, bool Residual>
void vq_few(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int block, int end_block, int row_end,
            bool accumulate, float* y, int64_t y_stride) {
  if constexpr (T > 1)
    if (n_tokens < T)
      return vq_few<T - 1, V, Centroids, Residual>(c, x, x_stride, n_tokens, block, end_block, row_end, accumulate, y,
                                                   y_stride);
  constexpr int R = few_vectors(T), kOne = Blocks<V>::kCount, kAll = R * kOne;
  for (; block + kAll <= end_block; block += kAll)
    vq_few_blocks<T, R, V, Centroids, Residual>(c, x, x_stride, block, kAll, row_end, accumulate, y, y_stride);
  for (; block < end_block; block += kOne) {
    const int n = end_block - block < kOne ? end_block - block : kOne;
    vq_few_blocks<T, 1, V, Centroids, Residual>(c, x, x_stride, block, n, row_end, accumulate, y, y_stride);
  }
}
