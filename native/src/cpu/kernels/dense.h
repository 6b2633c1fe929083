// Rows of a dense matrix times activations. Included inside an anonymous namespace, after elementwise.h.
//
// A sum runs over 16 lanes, then over the rest. The weights are made floats in registers, for one token or a few; or,
// where there are too few registers for that, in a piece of the row that serves many. Either way the same operations
// in the same order.

constexpr int kDenseRows = 4;       // that share the loads of x
constexpr int kDenseFewTokens = 4;  // that share a weight in registers,
constexpr bool kAllInRegisters =    // which for any number of tokens is the faster way where their sums fit
    kSumVectors * kVector >= kDenseFewTokens * kDenseRows * kWidth;
constexpr int kPiece = 256;       // columns that are made floats for many tokens
constexpr int kDenseTokens = 64;  // whose sums are kept while a piece is there

// How the weights of a row lie in memory: load<N>(row, i) gives the N from i on, a multiple of N, which is at most 16.
template <DType Type>
struct DenseRow;
template <>
struct DenseRow<DType::f32> {
  template <int N>
  static Lanes<N> load(const std::byte* row, int i) {
    return Lanes<N>::load(reinterpret_cast<const float*>(row) + i);
  }
};
template <>
struct DenseRow<DType::f16> {
  template <int N>
  static Lanes<N> load(const std::byte* row, int i) {
    return Lanes<N>::load_f16(reinterpret_cast<const uint16_t*>(row) + i);
  }
};
template <>
struct DenseRow<DType::bf16> {
  template <int N>
  static Lanes<N> load(const std::byte* row, int i) {
    return Lanes<N>::load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
  }
};
template <>
struct DenseRow<DType::q8_0> {
  template <int N>
  static Lanes<N> load(const std::byte* row, int i) {
    const std::byte* block = row + int64_t{i} / kQ8Block * kQ8BlockBytes;
    const auto* scale = reinterpret_cast<const uint16_t*>(block);
    const auto* q = reinterpret_cast<const int8_t*>(block + 2) + i % kQ8Block;
    return Lanes<N>::broadcast_f16(scale) * Lanes<N>::load_i8(q);
  }
};
// q d + m, m being -8 d or -16 d where the block has none: exact but for the sum with an m of its own.
template <DType Type>
struct PackedRow {
  template <int N>
  static Lanes<N> load(const std::byte* row, int i) {
    constexpr TypeLayout kLayout = layout_of(Type);
    constexpr bool kFive = kLayout.bits == 5, kMin = kLayout.has_min;
    const std::byte* block = row + int64_t{i} / kLayout.block * kLayout.block_bytes;
    const auto* halves = reinterpret_cast<const uint16_t*>(block);
    const auto* fifth = reinterpret_cast<const uint8_t*>(block + (kMin ? 4 : 2));
    const int j = i % kLayout.block;
    const uint8_t* lower = fifth + (kFive ? 4 : 0) + j % 16;
    const int shift = j < 16 ? 0 : 4;
    const Lanes<N> d = Lanes<N>::broadcast_f16(halves);
    const Lanes<N> m = kMin ? Lanes<N>::broadcast_f16(halves + 1) : d * Lanes<N>::broadcast(kFive ? -16 : -8);
    if constexpr (kFive) {
      uint32_t bits;
      __builtin_memcpy(&bits, fifth, 4);
      return fma(Lanes<N>::load_u5(lower, shift, bits >> j), d, m);
    } else {
      return fma(Lanes<N>::load_u4(lower, shift), d, m);
    }
  }
};
template <>
struct DenseRow<DType::q4_0> : PackedRow<DType::q4_0> {};
template <>
struct DenseRow<DType::q4_1> : PackedRow<DType::q4_1> {};
template <>
struct DenseRow<DType::q5_0> : PackedRow<DType::q5_0> {};
template <>
struct DenseRow<DType::q5_1> : PackedRow<DType::q5_1> {};

// Elements [first, first + n) of a row as float; first is a multiple of kWidth.
template <class Weights>
void convert(const std::byte* row, int first, int n, float* out) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) Weights::template load<kWidth>(row, first + i).store(out + i);
  for (; i < n; ++i) Weights::template load<1>(row, first + i).store(out + i);
}

template <DType Type>
constexpr int64_t dense_row_bytes(int64_t n) {
  constexpr TypeLayout kLayout = layout_of(Type);
  return n / kLayout.block * kLayout.block_bytes;
}

// Asks for what lies as far on as the rows that are being read: so many at a time are more than the processor foresees.
// Inlined by force, as prefetch_indices() is.
template <int R>
[[gnu::always_inline]] inline void prefetch_rows(const std::byte* w, int64_t row_bytes, int64_t offset) {
  for (int r = 0; r < R; ++r) __builtin_prefetch(w + (R + r) * row_bytes + offset);
}

// R rows of at most T tokens.
template <int T, int R, class Weights>
void dense_few(const std::byte* w, int64_t row_bytes, int in_features, const float* x, int64_t x_stride, int n_tokens,
               float* y, int64_t y_stride) {
  if constexpr (T > 1)
    if (n_tokens < T)
      return dense_few<T - 1, R, Weights>(w, row_bytes, in_features, x, x_stride, n_tokens, y, y_stride);
  Row acc[T][R];
  for (auto& sums : acc)
    for (auto& a : sums) a = Row::broadcast(0);
  int i = 0;
  const auto add = [&] {
    Row xi[T];
    for (int t = 0; t < T; ++t) xi[t] = Row::load(x + t * x_stride + i);
    for (int r = 0; r < R; ++r) {
      const Row wi = Weights::template load<kWidth>(w + r * row_bytes, i);
      for (int t = 0; t < T; ++t) acc[t][r] = fma(xi[t], wi, acc[t][r]);
    }
    i += kWidth;
  };
  constexpr int kBlock = 2 * kWidth;
  const int64_t block_bytes = kBlock * row_bytes / in_features;
  while (i + kBlock <= in_features) {  // a quantised block at a time, whose scale is loaded once
    prefetch_rows<R>(w, row_bytes, i / kBlock * block_bytes);
    add();
    add();
  }
  while (i + kWidth <= in_features) add();
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) {
      float rest = 0;
      for (int k = i; k < in_features; ++k)
        rest += x[t * x_stride + k] * sum(Weights::template load<1>(w + r * row_bytes, k));
      y[t * y_stride + r] = sum(acc[t][r]) + rest;
    }
}

// R rows of any number of tokens, up to kDenseTokens.
template <int R, class Weights>
void dense_tokens(const std::byte* w, int64_t row_bytes, int in_features, const float* x, int64_t x_stride,
                  int n_tokens, float* y, int64_t y_stride) {
  float piece[R][kPiece];
  float lanes[kDenseTokens][R][kWidth];
  float rest[kDenseTokens][R];
  __builtin_memset(lanes, 0, sizeof(lanes[0]) * n_tokens);
  __builtin_memset(rest, 0, sizeof(rest[0]) * n_tokens);
  for (int i0 = 0; i0 < in_features; i0 += kPiece) {
    const int n = in_features - i0 < kPiece ? in_features - i0 : kPiece;
    const int whole = n / kWidth * kWidth;
    for (int r = 0; r < R; ++r) convert<Weights>(w + r * row_bytes, i0, n, piece[r]);
    for (int t = 0; t < n_tokens; ++t) {
      const float* xt = x + t * x_stride + i0;
      Row acc[R];
      for (int r = 0; r < R; ++r) acc[r] = Row::load(lanes[t][r]);
      for (int i = 0; i < whole; i += kWidth) {
        const Row xi = Row::load(xt + i);
        for (int r = 0; r < R; ++r) acc[r] = fma(xi, Row::load(piece[r] + i), acc[r]);
      }
      for (int r = 0; r < R; ++r) acc[r].store(lanes[t][r]);
      for (int r = 0; r < R; ++r)
        for (int i = whole; i < n; ++i) rest[t][r] += xt[i] * piece[r][i];
    }
  }
  for (int t = 0; t < n_tokens; ++t)
    for (int r = 0; r < R; ++r) y[t * y_stride + r] = sum(Row::load(lanes[t][r])) + rest[t][r];
}

template <int R, class Weights>
void dense_together(const std::byte* w, int64_t row_bytes, int in_features, const float* x, int64_t x_stride,
                    int n_tokens, float* y, int64_t y_stride) {
  if constexpr (kAllInRegisters) {
    for (int t = 0; t < n_tokens; t += kDenseFewTokens)
      dense_few<kDenseFewTokens, R, Weights>(w, row_bytes, in_features, x + t * x_stride, x_stride, n_tokens - t,
                                             y + t * y_stride, y_stride);
  } else if (n_tokens == 1) {
    dense_few<1, R, Weights>(w, row_bytes, in_features, x, x_stride, 1, y, y_stride);
  } else {
    dense_tokens<R, Weights>(w, row_bytes, in_features, x, x_stride, n_tokens, y, y_stride);
  }
}

template <DType Type>
void dense_rows(const Tensor& w, int in_features, const float* x, int64_t x_stride, int n_tokens, int row_begin,
                int row_end, float* y, int64_t y_stride) {
  using Weights = DenseRow<Type>;
  const int64_t row_bytes = dense_row_bytes<Type>(in_features);
  for (int t = 0; t < n_tokens; t += kDenseTokens) {
    const int tokens = n_tokens - t < kDenseTokens ? n_tokens - t : kDenseTokens;
    const float* xt = x + t * x_stride;
    for (int r = row_begin; r < row_end;) {
      const bool several = r + kDenseRows <= row_end;
      const auto rows = several ? dense_together<kDenseRows, Weights> : dense_together<1, Weights>;
      rows(w.data + r * row_bytes, row_bytes, in_features, xt, x_stride, tokens, y + t * y_stride + r, y_stride);
      r += several ? kDenseRows : 1;
    }
  }
}

void dense(const Tensor& w, int in_features, const float* x, int64_t x_stride, int n_tokens, int row_begin, int row_end,
           float* y, int64_t y_stride) {
  with_matrix_type(w.type, [&]<DType Type>() {
    dense_rows<Type>(w, in_features, x, x_stride, n_tokens, row_begin, row_end, y, y_stride);
  });
}

void row(const Tensor& table, int64_t row, int n, float* out) {
  with_matrix_type(table.type, [&]<DType Type>() {
    convert<DenseRow<Type>>(table.data + row * dense_row_bytes<Type>(n), 0, n, out);
  });
}
