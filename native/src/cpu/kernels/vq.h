// Columns of a vector-quantised matrix times activations: which kernel. Included inside an anonymous namespace, last of
// those that it needs.
//
// Each weight is looked up, then added as x * w to its row's sum, column by column: for a few tokens straight from the
// codebook (vq_few.h), for many from a tile of weights looked up once (vq_many.h). Either way the same operations in
// the same order.

template <int V, class Centroids, bool Residual>
void vq_rows(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int row_begin, int row_end,
             bool accumulate, float* y, int64_t y_stride) {
  const int first_block = row_begin / V, end_block = (row_end + V - 1) / V;
  constexpr int T = kFewTokens<Centroids>;
  if (n_tokens == 1 || (T > 1 && n_tokens <= 2 * T)) {  // to look up twice is faster than a tile
    const int first = n_tokens <= T ? n_tokens : (n_tokens + 1) / 2;
    for (int t = 0; t < n_tokens; t += first)
      vq_few<T, V, Centroids, Residual>(c, x + c.first_column + t * x_stride, x_stride,
                                        n_tokens - t < first ? n_tokens - t : first, first_block, end_block, row_end,
                                        accumulate, y + t * y_stride, y_stride);
    return;
  }
  vq_many<F32Activations, V, Centroids, Residual>(c, {x + c.first_column, x_stride}, n_tokens, first_block, end_block,
                                                  row_end, accumulate, y, y_stride);
}

// Any vector length, one weight at a time.
template <class Centroids>
void vq_rows_any(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int row_begin, int row_end,
                 bool accumulate, float* y, int64_t y_stride) {
  using Element = typename Centroids::Element;
  const auto* centroids = reinterpret_cast<const Element*>(c.centroids);
  const auto* res_centroids = reinterpret_cast<const Element*>(c.res_centroids);
  const uint32_t mask = (1u << c.index_bits) - 1;
  uint32_t values[kTileColumns];
  const Unpacker unpack(c.index_bits + c.res_bits);
  for (int t = 0; t < n_tokens; ++t)
    for (int row = row_begin; row < row_end; row += c.v) {
      float acc[kMaxVectorLength] = {};
      for (int q = 0; q < c.n_groups; ++q)
        for (int j0 = 0; j0 < c.group_size; j0 += kTileColumns) {
          const int n = c.group_size - j0 < kTileColumns ? c.group_size - j0 : kTileColumns;
          unpack(index_row(c, q, row / c.v), c.row_bytes, j0, n, [&](int j, Words w) { w.store(values + j); });
          for (int j = 0; j < n; ++j) {
            const float xj = x[t * x_stride + c.first_column + q * c.group_size + j0 + j];
            const Element* w = centroids + (int64_t{q} * c.k + (values[j] & mask)) * c.v;
            for (int lane = 0; lane < c.v; ++lane) {
              const Element* p = w + lane;
              Lanes<1> weight = Centroids::template load<Block<1>>(&p);
              if (c.r) {
                p = res_centroids + (int64_t{q} * c.r + (values[j] >> c.index_bits)) * c.v + lane;
                weight = weight + Centroids::template load<Block<1>>(&p);
              }
              acc[lane] = sum(fma(Lanes<1>::broadcast(xj), weight, Lanes<1>::broadcast(acc[lane])));
            }
          }
        }
      float* out = y + t * y_stride + row;
      for (int lane = 0; lane < c.v && row + lane < row_end; ++lane)
        out[lane] = accumulate ? out[lane] + acc[lane] : acc[lane];
    }
}

void vq(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int row_begin, int row_end, bool accumulate,
        float* y, int64_t y_stride) {
  const auto run = [&](auto kernel) { kernel(c, x, x_stride, n_tokens, row_begin, row_end, accumulate, y, y_stride); };
  if (has_kernel(c.v))
    with_codebook(c, [&]<int V, class Centroids, bool Residual>() { run(vq_rows<V, Centroids, Residual>); });
  else
    with_centroids(c, [&]<class Centroids>() { run(vq_rows_any<Centroids>); });
}

// In 16-bit integers; c.v has a kernel.
void vq_i16(const VqColumns& c, const float* w_steps, const float* x, int64_t x_stride, int n_tokens, int row_begin,
            int row_end, bool accumulate, float* y, int64_t y_stride) {
  with_codebook(c, [&]<int V, class Centroids, bool Residual>() {
    vq_many<I16Activations, V, Centroids, Residual>(c, {x, x_stride, w_steps}, n_tokens, row_begin / V,
                                                    (row_end + V - 1) / V, row_end, accumulate, y, y_stride);
  });
}
