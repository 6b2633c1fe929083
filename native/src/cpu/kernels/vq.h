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

template <class Centroids>
void vq_of(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int row_begin, int row_end,
           bool accumulate, float* y, int64_t y_stride) {
  const auto run = [&](auto kernel) { kernel(c, x, x_stride, n_tokens, row_begin, row_end, accumulate, y, y_stride); };
  const bool residual = c.r != 0;
  switch (c.v) {  // the lengths that models use
    case 2: return run(residual ? vq_rows<2, Centroids, true> : vq_rows<2, Centroids, false>);
    case 4: return run(residual ? vq_rows<4, Centroids, true> : vq_rows<4, Centroids, false>);
    case 6: return run(residual ? vq_rows<6, Centroids, true> : vq_rows<6, Centroids, false>);
    case 8: return run(residual ? vq_rows<8, Centroids, true> : vq_rows<8, Centroids, false>);
    case 12: return run(residual ? vq_rows<12, Centroids, true> : vq_rows<12, Centroids, false>);
    case 16: return run(residual ? vq_rows<16, Centroids, true> : vq_rows<16, Centroids, false>);
    default: return run(vq_rows_any<Centroids>);
  }
}

void vq(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int row_begin, int row_end, bool accumulate,
        float* y, int64_t y_stride) {
  const auto kernel = c.type == DType::f16    ? vq_of<F16Centroids>
                      : c.type == DType::bf16 ? vq_of<Bf16Centroids>
                                              : vq_of<F32Centroids>;
  kernel(c, x, x_stride, n_tokens, row_begin, row_end, accumulate, y, y_stride);
}

// In 16-bit integers.
template <int V>
void vq_i16_of(const VqColumns& c, const I16Activations& x, int n_tokens, int row_begin, int row_end, bool accumulate,
               float* y, int64_t y_stride) {
  const auto run = [&](auto kernel) {
    kernel(c, x, n_tokens, row_begin / V, (row_end + V - 1) / V, row_end, accumulate, y, y_stride);
  };
  using X = I16Activations;
  switch (c.type) {
    case DType::f16: return run(c.r ? vq_many<X, V, F16Centroids, true> : vq_many<X, V, F16Centroids, false>);
    case DType::bf16: return run(c.r ? vq_many<X, V, Bf16Centroids, true> : vq_many<X, V, Bf16Centroids, false>);
    default: return run(c.r ? vq_many<X, V, F32Centroids, true> : vq_many<X, V, F32Centroids, false>);
  }
}

void vq_i16(const VqColumns& c, const float* w_steps, const float* x, int64_t x_stride, int n_tokens, int row_begin,
            int row_end, bool accumulate, float* y, int64_t y_stride) {
  const auto kernel = c.v == 2    ? vq_i16_of<2>
                      : c.v == 4  ? vq_i16_of<4>
                      : c.v == 6  ? vq_i16_of<6>
                      : c.v == 8  ? vq_i16_of<8>
                      : c.v == 12 ? vq_i16_of<12>
                                  : vq_i16_of<16>;
  kernel(c, {x, x_stride, w_steps}, n_tokens, row_begin, row_end, accumulate, y, y_stride);
}
