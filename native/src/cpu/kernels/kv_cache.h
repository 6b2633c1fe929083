// Keys and values as they lie in a block of the cache (KvLayout in backend.h): to there, and back to floats. Included
// inside an anonymous namespace, after elementwise.h.
//
// What does not fit its type is stored as NaN, infinity too: a score of minus infinity would go unnoticed. A value that
// does not fit becomes a NaN in its key: among the values it would reach those who do not see it, times a weight of 0.

constexpr int kBlock = KvLayout::kBlockTokens;
constexpr int kParts = kBlock / kWidth;
constexpr float kNaN = __builtin_nanf("");
constexpr uint16_t kHalfNaN = 0x7e00;

// A format has
//   kElementBytes   of one element of all tokens' keys, or values
//   kWholeBlocks    whether head_dim is a multiple of kBlock
//   put_key         writes token s's key (head_dim) to a head's keys
//   put_value       writes its value to a head's values
//   kLimit          what the magnitudes of a value have to be below
//   spoil           makes NaN of token s's key, 0 of its value
//   Keys(keys, d)   the matrix (kBlock, kBlock) of elements d + j of all tokens' keys; d is a multiple of kBlock
//   Values(values, head_dim, d)  the matrix (kBlock, kBlock) of elements [d, d + kBlock) of token j's value
// A matrix m gives its floats by m(j, i): part i, of kWidth, of row j.

// Formats whose elements stand for themselves. Keys (head_dim, kBlock), values (kBlock, head_dim).
template <class T>
struct PlainCache {
  static constexpr int kElementBytes = kBlock * sizeof(T);
  static constexpr bool kWholeBlocks = false;

  static void put_key(const float* k, int head_dim, int s, std::byte* keys) {
    auto* out = reinterpret_cast<T*>(keys) + s;
    T elements[kWidth];
    for (int d = 0; d < head_dim; d += kWidth) {
      const int n = head_dim - d < kWidth ? head_dim - d : kWidth;
      convert(k + d, n, elements);
      for (int i = 0; i < n; ++i) out[int64_t{d + i} * kBlock] = elements[i];
    }
  }
  static void put_value(const float* v, int head_dim, int s, std::byte* values) {
    convert(v, head_dim, reinterpret_cast<T*>(values) + int64_t{s} * head_dim);
  }

  static constexpr float kLimit = sizeof(T) == 2 ? 65520 : __builtin_huge_valf();
  static void spoil(int head_dim, int s, std::byte* keys, std::byte* values) {
    convert(&kNaN, 1, reinterpret_cast<T*>(keys) + s);
    __builtin_memset(reinterpret_cast<T*>(values) + int64_t{s} * head_dim, 0, head_dim * sizeof(T));
  }

  class Keys {
   public:
    Keys(const std::byte* keys, int d) : from_(reinterpret_cast<const T*>(keys) + int64_t{d} * kBlock) {}
    Row operator()(int j, int i) const { return load<kWidth>(from_ + j * kBlock + i * kWidth); }

   private:
    const T* from_;
  };

  class Values {
   public:
    Values(const std::byte* values, int head_dim, int d)
        : from_(reinterpret_cast<const T*>(values) + d), head_dim_(head_dim) {}
    Row operator()(int s, int i) const { return load<kWidth>(from_ + int64_t{s} * head_dim_ + i * kWidth); }
    // The first n of a row.
    void some(int s, int n, float* out) const {
      int i = 0;
      for (; i + kWidth <= n; i += kWidth) (*this)(s, i / kWidth).store(out + i);
      for (; i < n; ++i) load<1>(from_ + int64_t{s} * head_dim_ + i).store(out + i);
    }

   private:
    const T* from_;
    int head_dim_;
  };

 private:
  template <int N>
  static Lanes<N> load(const uint16_t* p) {
    return Lanes<N>::load_f16(p);
  }
  template <int N>
  static Lanes<N> load(const float* p) {
    return Lanes<N>::load(p);
  }
  static void convert(const float* x, int n, uint16_t* out) {
    to_half(x, n, out);
    for (int i = 0; i < n; ++i) out[i] |= (out[i] & 0x7fff) == 0x7c00 ? 0x0200 : 0;
  }
  static void convert(const float* x, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = x[i] + (x[i] - x[i]);
  }
};

// Q8_0: a token's blocks of kQ8Block elements. Its values are Q8_0 rows; of the keys, the block b of all tokens lies
// together: kBlock scales, then (kQ8Block, kBlock) int8.
struct Q8Cache {
  static_assert(kBlock == kQ8Block);
  static constexpr int kElementBytes = kBlock * kQ8BlockBytes / kQ8Block;
  static constexpr bool kWholeBlocks = true;
  static constexpr int kKeysBytes = kBlock * kQ8BlockBytes;  // of one block b
  static constexpr int kScalesBytes = 2 * kBlock;

  static void put_key(const float* k, int head_dim, int s, std::byte* keys) {
    int8_t q[kQ8Block];
    for (int d = 0; d < head_dim; d += kQ8Block, keys += kKeysBytes) {
      const uint16_t scale = quantize(k + d, q);
      __builtin_memcpy(keys + 2 * s, &scale, 2);
      for (int i = 0; i < kQ8Block; ++i) keys[kScalesBytes + i * kBlock + s] = std::byte(q[i]);
    }
  }
  static void put_value(const float* v, int head_dim, int s, std::byte* values) {
    std::byte* block = values + row_bytes(head_dim) * s;
    for (int d = 0; d < head_dim; d += kQ8Block, block += kQ8BlockBytes) {
      const uint16_t scale = quantize(v + d, reinterpret_cast<int8_t*>(block + 2));
      __builtin_memcpy(block, &scale, 2);
    }
  }

  static constexpr float kLimit = 65520.0f * 127;
  static void spoil(int head_dim, int s, std::byte* keys, std::byte* values) {
    __builtin_memcpy(keys + 2 * s, &kHalfNaN, 2);
    __builtin_memset(values + row_bytes(head_dim) * s, 0, size_t(row_bytes(head_dim)));
  }

  class Keys {
   public:
    Keys(const std::byte* keys, int d)
        : q_(reinterpret_cast<const int8_t*>(keys + d / kQ8Block * kKeysBytes + kScalesBytes)) {
      const auto* scales = reinterpret_cast<const uint16_t*>(keys + d / kQ8Block * kKeysBytes);
      for (int i = 0; i < kParts; ++i) scales_[i] = Row::load_f16(scales + i * kWidth);
    }
    Row operator()(int j, int i) const { return scales_[i] * Row::load_i8(q_ + j * kBlock + i * kWidth); }

   private:
    Row scales_[kParts];
    const int8_t* q_;
  };

  class Values {
   public:
    Values(const std::byte* values, int head_dim, int d)
        : from_(values + d / kQ8Block * kQ8BlockBytes), row_bytes_(row_bytes(head_dim)) {}
    Row operator()(int s, int i) const {
      const std::byte* block = from_ + s * row_bytes_;
      uint16_t scale;
      __builtin_memcpy(&scale, block, 2);
      return Row::broadcast_f16(&scale) * Row::load_i8(reinterpret_cast<const int8_t*>(block + 2) + i * kWidth);
    }

   private:
    const std::byte* from_;
    int64_t row_bytes_;
  };

 private:
  static int64_t row_bytes(int head_dim) { return int64_t{head_dim} / kQ8Block * kQ8BlockBytes; }

  // The scale of kQ8Block numbers; q: how many times the scale each is.
  static uint16_t quantize(const float* x, int8_t* q) {
    float largest = 0, rest = 0;  // rest: NaN if one of them is NaN or infinite
    for (int i = 0; i < kQ8Block; ++i) {
      const float size = __builtin_fabsf(x[i]);
      largest = size > largest ? size : largest;
      rest += x[i] - x[i];
    }
    const uint16_t scale = float_to_f16(largest / 127 + rest);
    const float unit = f16_to_float(scale);
    if (unit - unit != 0) {  // infinite or NaN
      __builtin_memset(q, 0, kQ8Block);
      return kHalfNaN;
    }
    const Row inverse = Row::broadcast(unit > 0 ? 1 / unit : 0);
    for (int i = 0; i < kQ8Block; i += kWidth) {
      float units[kWidth];  // beyond 127 where the scale was rounded down
      max(Row::broadcast(-127), min(Row::broadcast(127), round(Row::load(x + i) * inverse))).store(units);
      for (int j = 0; j < kWidth; ++j) q[i + j] = int8_t(units[j]);
    }
    return scale;
  }
};

template <class Cache>
void store_as(const float* k, const float* v, int head_dim, int slot, std::byte* keys, std::byte* values) {
  Cache::put_key(k, head_dim, slot, keys);
  Cache::put_value(v, head_dim, slot, values);
  bool fits = true;
  for (int d = 0; d < head_dim; ++d) fits &= __builtin_fabsf(v[d]) < Cache::kLimit;
  if (!fits) Cache::spoil(head_dim, slot, keys, values);
}

void store_kv(const float* k, const float* v, DType type, int head_dim, int slot, std::byte* keys, std::byte* values) {
  const auto kernel = type == DType::q8_0  ? store_as<Q8Cache>
                      : type == DType::f16 ? store_as<PlainCache<uint16_t>>
                                           : store_as<PlainCache<float>>;
  kernel(k, v, head_dim, slot, keys, values);
}
