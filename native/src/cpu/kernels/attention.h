// Attention over a span of a paged cache. Included inside an anonymous namespace, after kv_cache.h.
//
// A block's keys and values are made floats once, for all the query heads and tokens that look at them. One pass over
// the blocks, the softmax kept relative to the largest score so far (Milakov and Gimelshein 2018, arXiv:1805.02867): no
// room for all scores is needed, however long the context. A row's numbers do not depend on the others: what it does
// not see has weight 0, and adding 0 changes nothing.

constexpr int kPieceDims = 64;  // elements of the keys that are floats at a time
constexpr int kRowsAtOnce = kSumVectors * kVector >= 8 * kBlock ? 8 : 2;  // whose sums fit the registers
constexpr int kParts = kBlock / kWidth;
using Tile = float[kBlock];  // rows of a matrix (n, kBlock)

// sums[r][sums_first + i] += sum_j x[r][x_first + j] w[j][i], for T rows r and the kBlock columns i
template <int T>
void multiply_add(const float* const* x, int x_first, const Tile* w, int n, float* const* sums, int sums_first) {
  Row acc[T][kParts];
  for (int r = 0; r < T; ++r)
    for (int i = 0; i < kParts; ++i) acc[r][i] = Row::load(sums[r] + sums_first + i * kWidth);
  for (int j = 0; j < n; ++j) {
    Row wj[kParts];
    for (int i = 0; i < kParts; ++i) wj[i] = Row::load(w[j] + i * kWidth);
    for (int r = 0; r < T; ++r) {
      const Row xj = Row::broadcast(x[r][x_first + j]);
      for (int i = 0; i < kParts; ++i) acc[r][i] = fma(xj, wj[i], acc[r][i]);
    }
  }
  for (int r = 0; r < T; ++r)
    for (int i = 0; i < kParts; ++i) acc[r][i].store(sums[r] + sums_first + i * kWidth);
}

template <int T>
void multiply_add_rows(int n_rows, const float* const* x, int x_first, const Tile* w, int n, float* const* sums,
                       int sums_first) {
  int r = 0;
  for (; r + T <= n_rows; r += T) multiply_add<T>(x + r, x_first, w, n, sums + r, sums_first);
  if constexpr (T > 1)
    if (r < n_rows) multiply_add_rows<T / 2>(n_rows - r, x + r, x_first, w, n, sums + r, sums_first);
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

// Asks for the part of the next block's keys or values that belongs to the elements [d, d + n).
template <class Cache>
[[gnu::always_inline]] inline void prefetch_part(const std::byte* next, int d, int n) {
  for (int64_t i = int64_t{d} * Cache::kElementBytes; i < int64_t{d + n} * Cache::kElementBytes; i += 64)
    __builtin_prefetch(next + i);
}

// Rows that see something of a block.
struct BlockRows {
  int n = 0;
  const float* q[AttentionRows::kMost];
  float* sums[AttentionRows::kMost];
  float* scores[AttentionRows::kMost];                         // then weights (kBlock)
  int begin[AttentionRows::kMost], end[AttentionRows::kMost];  // what each sees
};

BlockRows rows_of(const AttentionRows& rows, int block, Tile* scores) {
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
void add_scores(const BlockRows& b, int head_dim, const std::byte* keys, const std::byte* next, Tile* w) {
  for (int r = 0; r < b.n; ++r) __builtin_memset(b.scores[r], 0, sizeof(Tile));
  for (int d = 0; d < head_dim; d += kPieceDims) {
    const int n = head_dim - d < kPieceDims ? head_dim - d : kPieceDims;
    prefetch_part<Cache>(next, d, n);
    Cache::keys(keys, d, n, w);
    multiply_add_rows<kRowsAtOnce>(b.n, b.q, d, w, n, b.scores, 0);
  }
}

template <class Cache>
void add_values(const BlockRows& b, int head_dim, const std::byte* values, const std::byte* next, Tile* w) {
  int begin = kBlock, end = 0;
  for (int r = 0; r < b.n; ++r) {
    begin = b.begin[r] < begin ? b.begin[r] : begin;
    end = b.end[r] > end ? b.end[r] : end;
  }
  for (int d = 0; d < head_dim; d += kBlock) {
    prefetch_part<Cache>(next, d, head_dim - d < kBlock ? head_dim - d : kBlock);
    for (int s = begin; s < end; ++s) Cache::value(values, head_dim, s, d, w[s]);
    multiply_add_rows<kRowsAtOnce>(b.n, b.scores, begin, w + begin, end - begin, b.sums, AttentionSums::kValues + d);
  }
}

inline void clear(float* sums, int head_dim) {
  sums[AttentionSums::kLargest] = -__builtin_huge_valf();
  sums[AttentionSums::kTotal] = 0;
  __builtin_memset(sums + AttentionSums::kValues, 0, (head_dim + kBlock - 1) / kBlock * sizeof(Tile));
}

template <class Cache>
void attend_as(const AttentionRows& rows, int first_block, int end_block) {
  const float scale = 1.0f / __builtin_sqrtf(float(rows.head_dim));
  alignas(64) Tile w[kPieceDims] = {};  // of keys, then of values; columns past head_dim are whatever is there
  alignas(64) Tile scores[AttentionRows::kMost];
  int last_block = 0;
  for (int r = 0; r < rows.n; ++r) {
    clear(rows.sums[r], rows.head_dim);
    last_block = rows.last[r] / kBlock > last_block ? rows.last[r] / kBlock : last_block;
  }
  for (int block = first_block; block < end_block && block <= last_block; ++block) {
    const BlockRows b = rows_of(rows, block, scores);
    if (b.n == 0) continue;
    const std::byte *at = rows.blocks[block], *next = rows.blocks[block < last_block ? block + 1 : block];
    add_scores<Cache>(b, rows.head_dim, at + rows.key_offset, next + rows.key_offset, w);
    for (int r = 0; r < b.n; ++r) softmax(b.scores[r], b.begin[r], b.end[r], scale, rows.head_dim, b.sums[r]);
    add_values<Cache>(b, rows.head_dim, at + rows.value_offset, next + rows.value_offset, w);
  }
}

void attend(const AttentionRows& rows, int first_block, int end_block) {
  const auto kernel = rows.type == DType::q8_0  ? attend_as<Q8Cache>
                      : rows.type == DType::f16 ? attend_as<PlainCache<uint16_t>>
                                                : attend_as<PlainCache<float>>;
  kernel(rows, first_block, end_block);
}
