// Attention over a span of a paged cache. Included inside an anonymous namespace, after kv_cache.h.
//
// One pass over the blocks, the softmax kept relative to the largest score so far (Milakov and Gimelshein 2018,
// arXiv:1805.02867): no room for all scores is needed, however long the context. All rows (query heads, tokens) that
// look at a block share its loads. A row's numbers do not depend on the others: what it does not see has weight 0, and
// adding 0 changes nothing, as no value in the cache is NaN or infinite.

constexpr int kRowsAtOnce = kSumVectors * kVector >= 8 * kBlock ? 8 : 2;  // whose sums fit the registers

// Floats as a matrix (see kv_cache.h), and room for them.
struct Tile {
  alignas(64) float a[kBlock][kBlock];

  Row operator()(int j, int i) const { return Row::load(a[j] + i * kWidth); }
};

// sums[r][sums_first + c] += sum_j x[r][x_first + j] w[j][c], for T rows r, j in [begin, end) and the kBlock columns c
// Inlined by force for the reason that vq_few_blocks has.
template <int T, class Matrix>
[[gnu::always_inline]] inline void multiply_add(const float* const* x, int x_first, const Matrix& w, int begin, int end,
                                                float* const* sums, int sums_first) {
  Row acc[T][kParts];
  for (int r = 0; r < T; ++r)
    for (int i = 0; i < kParts; ++i) acc[r][i] = Row::load(sums[r] + sums_first + i * kWidth);
  for (int j = begin; j < end; ++j) {
    Row wj[kParts];
    for (int i = 0; i < kParts; ++i) wj[i] = w(j, i);
    for (int r = 0; r < T; ++r) {
      const Row xj = Row::broadcast(x[r][x_first + j]);
      for (int i = 0; i < kParts; ++i) acc[r][i] = fma(xj, wj[i], acc[r][i]);
    }
  }
  for (int r = 0; r < T; ++r)
    for (int i = 0; i < kParts; ++i) acc[r][i].store(sums[r] + sums_first + i * kWidth);
}

// The same for any number of rows; T of them or fewer at once.
template <int T, class Matrix>
void multiply_add_rows(int n, const float* const* x, int x_first, const Matrix& w, int begin, int end,
                       float* const* sums, int sums_first) {
  int r = 0;
  for (; r + T <= n; r += T) multiply_add<T>(x + r, x_first, w, begin, end, sums + r, sums_first);
  if constexpr (T > 1)
    if (r < n) multiply_add_rows<T / 2>(n - r, x + r, x_first, w, begin, end, sums + r, sums_first);
}

// The same for keys or values as they are in the cache. They become floats in registers where all rows go at once, or
// else in a tile.
template <class Matrix>
void multiply_add_block(int n, const float* const* x, int x_first, const Matrix& w, int begin, int end,
                        float* const* sums, int sums_first, Tile& tile) {
  if (n <= kRowsAtOnce && (n & (n - 1)) == 0)
    return multiply_add_rows<kRowsAtOnce>(n, x, x_first, w, begin, end, sums, sums_first);
  for (int j = begin; j < end; ++j)
    for (int i = 0; i < kParts; ++i) w(j, i).store(tile.a[j] + i * kWidth);
  multiply_add_rows<kRowsAtOnce>(n, x, x_first, tile, begin, end, sums, sums_first);
}

inline float largest_of(Row x) {
  float a[kWidth];
  x.store(a);
  for (int n = kWidth / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
  return a[0];
}

// Makes weights of a row's scores over a block, of whose positions it sees [begin, end), and adds them to its sums,
// which are scaled to the largest score that there is now.
inline void softmax(float* scores, int begin, int end, float scale, int head_dim, float* sums) {
  const auto outside = [&](float value) {
    for (int s = 0; s < begin; ++s) scores[s] = value;
    for (int s = end; s < kBlock; ++s) scores[s] = value;
  };
  outside(-__builtin_huge_valf());
  Row most = Row::broadcast(-__builtin_huge_valf());
  for (int s = 0; s < kBlock; s += kWidth) {
    const Row scaled = Row::load(scores + s) * Row::broadcast(scale);
    scaled.store(scores + s);
    most = max(most, scaled);
  }
  const float before = sums[AttentionSums::kLargest], found = largest_of(most);
  const float largest = found > before ? found : before;
  for (int s = 0; s < kBlock; s += kWidth) exp(Row::load(scores + s) - Row::broadcast(largest)).store(scores + s);
  outside(0);
  if (largest != before) {
    const float keep = sum(exp(Lanes<1>::broadcast(before - largest)));
    sums[AttentionSums::kLargest] = largest;
    sums[AttentionSums::kTotal] *= keep;
    float* values = sums + AttentionSums::kValues;
    for (int d = 0; d < head_dim; ++d) values[d] *= keep;
  }
  Row total = Row::broadcast(0);
  for (int s = 0; s < kBlock; s += kWidth) total = total + Row::load(scores + s);
  sums[AttentionSums::kTotal] += sum(total);
}

// A matrix of keys or values, each of whose rows asks for a piece of the next block's. All of a block at once would be
// more than the processor can wait for.
template <class Matrix>
struct Ahead {
  const Matrix& w;
  const std::byte* next;
  int piece_bytes;

  [[gnu::always_inline]] Row operator()(int j, int i) const {
    if (i == 0) __builtin_prefetch(next + j * piece_bytes);
    return w(j, i);
  }
};

// Rows that see something of a block.
struct BlockRows {
  int n = 0;
  const float* q[AttentionRows::kMost];
  float* sums[AttentionRows::kMost];
  float* scores[AttentionRows::kMost];                         // then weights (kBlock)
  int begin[AttentionRows::kMost], end[AttentionRows::kMost];  // what each sees
};

BlockRows rows_of(const AttentionRows& rows, int block, float (*scores)[kBlock]) {
  BlockRows b;
  for (int r = 0; r < rows.n; ++r) {
    const int first = rows.first[r] - block * kBlock, end = rows.last[r] - block * kBlock + 1;
    if (first >= kBlock || end <= 0) continue;
    b.q[b.n] = rows.q[r];
    b.sums[b.n] = rows.sums[r];
    b.scores[b.n] = scores[b.n];
    b.begin[b.n] = first > 0 ? first : 0;
    b.end[b.n++] = end < kBlock ? end : kBlock;
  }
  return b;
}

template <class Cache>
void add_scores(const BlockRows& b, int head_dim, const std::byte* keys, const std::byte* next, Tile& tile) {
  for (int r = 0; r < b.n; ++r) __builtin_memset(b.scores[r], 0, kBlock * sizeof(float));
  for (int d = 0; d < head_dim; d += kBlock) {
    const int n = head_dim - d < kBlock ? head_dim - d : kBlock;
    const typename Cache::Keys w(keys, d);
    const Ahead<typename Cache::Keys> ahead{w, next + int64_t{d} * Cache::kElementBytes, Cache::kElementBytes};
    multiply_add_block(b.n, b.q, d, ahead, 0, n, b.scores, 0, tile);
  }
}

template <class Cache>
void add_values(const BlockRows& b, int head_dim, const std::byte* values, const std::byte* next, Tile& tile) {
  int begin = kBlock, end = 0;
  for (int r = 0; r < b.n; ++r) {
    begin = b.begin[r] < begin ? b.begin[r] : begin;
    end = b.end[r] > end ? b.end[r] : end;
  }
  for (int d = 0; d < head_dim; d += kBlock) {
    const int n = head_dim - d < kBlock ? head_dim - d : kBlock, at = AttentionSums::kValues + d;
    const typename Cache::Values w(values, head_dim, d);
    if (Cache::kWholeBlocks || n == kBlock) {
      const Ahead<typename Cache::Values> ahead{w, next + int64_t{d} * Cache::kElementBytes, Cache::kElementBytes};
      multiply_add_block(b.n, b.scores, 0, ahead, begin, end, b.sums, at, tile);
    } else if constexpr (!Cache::kWholeBlocks) {  // the columns from n on are whatever is there, and so are their sums
      for (int s = begin; s < end; ++s) w.some(s, n, tile.a[s]);
      multiply_add_rows<kRowsAtOnce>(b.n, b.scores, 0, tile, begin, end, b.sums, at);
    }
  }
}

inline void clear(float* sums, int head_dim) {
  sums[AttentionSums::kLargest] = -__builtin_huge_valf();
  sums[AttentionSums::kTotal] = 0;
  __builtin_memset(sums + AttentionSums::kValues, 0, (head_dim + kBlock - 1) / kBlock * kBlock * sizeof(float));
}

template <class Cache>
void attend_as(const AttentionRows& rows, int first_block, int end_block) {
  const float scale = 1.0f / __builtin_sqrtf(float(rows.head_dim));
  Tile tile = {};
  alignas(64) float scores[AttentionRows::kMost][kBlock];
  int last_block = 0;
  for (int r = 0; r < rows.n; ++r) {
    clear(rows.sums[r], rows.head_dim);
    last_block = rows.last[r] / kBlock > last_block ? rows.last[r] / kBlock : last_block;
  }
  for (int block = first_block; block < end_block && block <= last_block; ++block) {
    const BlockRows b = rows_of(rows, block, scores);
    if (b.n == 0) continue;
    const std::byte *at = rows.blocks[block], *next = rows.blocks[block < last_block ? block + 1 : block];
    add_scores<Cache>(b, rows.head_dim, at + rows.key_offset, next + rows.key_offset, tile);
    for (int r = 0; r < b.n; ++r) softmax(b.scores[r], b.begin[r], b.end[r], scale, rows.head_dim, b.sums[r]);
    add_values<Cache>(b, rows.head_dim, at + rows.value_offset, next + rows.value_offset, tile);
  }
}

void attend(const AttentionRows& rows, int first_block, int end_block) {
  const auto kernel = rows.type == DType::q8_0  ? attend_as<Q8Cache>
                      : rows.type == DType::f16 ? attend_as<PlainCache<uint16_t>>
                                                : attend_as<PlainCache<float>>;
  kernel(rows, first_block, end_block);
}
