// Columns of a vector-quantised matrix times activations. Included inside an anonymous namespace, after codebook.h and
// vq_token.h.
//
// Each weight is looked up, then added as x * w to its row's sum, column by column: for one token straight from the
// codebook, for several from a tile of weights looked up once. Either way the same operations in the same order.

constexpr int kTileTokens = 128;  // whose sums are kept while a tile is there

// The blocks of a tile, so that its rows fill whole vectors of kWidth floats: 32 rows, or 48.
constexpr int tile_blocks(int v) { return v == 2 ? 16 : v <= 6 ? 8 : v <= 12 ? 4 : 2; }

// T tokens' sums over one tile: sums[t][row] += sum_j x[t][j] w[j][row]
template <int T, int Rows>
void multiply_tile(const float* x, int64_t x_stride, const float (*w)[Rows], int n, float (*sums)[Rows]) {
  constexpr int kParts = Rows / kWidth;
  Row acc[T][kParts];
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < kParts; ++i) acc[t][i] = Row::load(sums[t] + i * kWidth);
  for (int j = 0; j < n; ++j) {
    Row wj[kParts];
    for (int i = 0; i < kParts; ++i) wj[i] = Row::load(w[j] + i * kWidth);
    for (int t = 0; t < T; ++t) {
      const Row xj = Row::broadcast(x[t * x_stride + j]);
      for (int i = 0; i < kParts; ++i) acc[t][i] = fma(xj, wj[i], acc[t][i]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < kParts; ++i) acc[t][i].store(sums[t] + i * kWidth);
}

// Up to kTileTokens tokens, up to tile_blocks(V) blocks.
template <int V, class Centroids, bool Residual>
void vq_tokens(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int block, int n_blocks, int row_end,
               bool accumulate, float* y, int64_t y_stride) {
  constexpr int kRows = tile_blocks(V) * V;
  alignas(64) float sums[kTileTokens][kRows];
  alignas(64) float w[kTileColumns][kRows];
  Offsets<Residual> offsets;
  const Unpacker unpack(c.index_bits + c.res_bits);
  __builtin_memset(sums, 0, sizeof(sums[0]) * n_tokens);
  __builtin_memset(w, 0, sizeof(w));  // rows of blocks that are not there
  for (int q = 0; q < c.n_groups; ++q) {
    const Codebook<V, Centroids, Residual> codebook(c, q);
    const float* xq = x + c.first_column + q * c.group_size;
    for (int j0 = 0; j0 < c.group_size; j0 += kTileColumns) {
      const int n = c.group_size - j0 < kTileColumns ? c.group_size - j0 : kTileColumns;
      for (int b = 0; b < n_blocks; ++b) {
        codebook.find(unpack, index_row(c, q, block + b), c.row_bytes, j0, n, offsets);
        prefetch_indices(c, q, block + b, j0, n, tile_blocks(V));
        for (int j = 0; j < n; ++j) codebook.template look_up<Block<V>>(&offsets, j).store(w[j] + b * V);
      }
      int t = 0;
      for (; t + kTokensAtOnce <= n_tokens; t += kTokensAtOnce)
        multiply_tile<kTokensAtOnce, kRows>(xq + t * x_stride + j0, x_stride, w, n, sums + t);
      for (; t + 2 <= n_tokens; t += 2) multiply_tile<2, kRows>(xq + t * x_stride + j0, x_stride, w, n, sums + t);
      if (t < n_tokens) multiply_tile<1, kRows>(xq + t * x_stride + j0, x_stride, w, n, sums + t);
    }
  }
  for (int t = 0; t < n_tokens; ++t)
    for (int b = 0; b < n_blocks; ++b) put<V>(sums[t] + b * V, block + b, row_end, accumulate, y + t * y_stride);
}

template <int V, class Centroids, bool Residual>
void vq_rows(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int row_begin, int row_end,
             bool accumulate, float* y, int64_t y_stride) {
  const int first_block = row_begin / V, end_block = (row_end + V - 1) / V;
  if (n_tokens == 1) return vq_token<V, Centroids, Residual>(c, x, first_block, end_block, row_end, accumulate, y);
  for (int t = 0; t < n_tokens; t += kTileTokens) {
    const int tokens = n_tokens - t < kTileTokens ? n_tokens - t : kTileTokens;
    for (int block = first_block; block < end_block; block += tile_blocks(V)) {
      const int blocks = end_block - block < tile_blocks(V) ? end_block - block : tile_blocks(V);
      vq_tokens<V, Centroids, Residual>(c, x + t * x_stride, x_stride, tokens, block, blocks, row_end, accumulate,
                                        y + t * y_stride, y_stride);
    }
  }
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
            const Element* res = c.r ? res_centroids + (int64_t{q} * c.r + (values[j] >> c.index_bits)) * c.v : nullptr;
            for (int lane = 0; lane < c.v; ++lane) {
              const Element *p = w + lane, *res_p = res + lane;
              Lanes<1> weight = Centroids::template load<Block<1>>(&p);
              if (c.r) weight = weight + Centroids::template load<Block<1>>(&res_p);
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
