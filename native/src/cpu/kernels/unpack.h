// Values packed back to back, least significant bit first. Included inside an anonymous namespace, after a vec_*.h.

// Words::kCount values of `bits` (1 to 32) bits begin at a whole byte and end within Words::kCount words, so the same
// permutation and shifts serve every kCount of a row. A value lies in one word or in two neighbours.
class Unpacker {
 public:
  static constexpr int kCount = Words::kCount;

  explicit Unpacker(int bits) : bits_(bits) {
    uint32_t low[kCount], high[kCount], right[kCount], left[kCount];
    for (int i = 0; i < kCount; ++i) {
      const int bit = i * bits;
      low[i] = uint32_t(bit / 32);
      high[i] = uint32_t(bit / 32 + 1) % kCount;  // past the last word only where none of its bits are wanted
      right[i] = uint32_t(bit % 32);
      left[i] = 32 - right[i];
    }
    low_ = Words::load(low);
    high_ = Words::load(high);
    right_ = Words::load(right);
    left_ = Words::load(left);
    mask_ = Words::broadcast(bits == 32 ? ~0u : (1u << bits) - 1);
  }

  // Calls use(i, values) with the values [first + i, first + i + kCount) of the row for i = 0, kCount, ... below n.
  // Past the row's end they are anything. `first` is a multiple of kCount.
  template <class Use>
  [[gnu::always_inline]] void operator()(const uint8_t* row, int64_t row_bytes, int64_t first, int n, Use use) const {
    const int64_t step = kCount * bits_ / 8, begin = first * bits_ / 8;
    const int64_t whole = row_bytes - begin < kBytes ? 0 : (row_bytes - begin - kBytes) / step * kCount + kCount;
    int i = 0;
    for (; i < n && i < whole; i += kCount) use(i, values(Words::load(row + begin + i / kCount * step)));
    for (; i < n; i += kCount) use(i, rest(row + begin + i / kCount * step, row + row_bytes));
  }

 private:
  static constexpr int kBytes = 4 * kCount;

  [[gnu::always_inline]] Words values(Words words) const {
    return (permute(words, low_) >> right_ | permute(words, high_) << left_) & mask_;
  }

  // Not inlined: the loop above would get slower by it.
  [[gnu::noinline]] Words rest(const uint8_t* p, const uint8_t* end) const {
    uint8_t bytes[kBytes] = {};
    __builtin_memcpy(bytes, p, size_t(end - p < kBytes ? end - p : kBytes));
    return values(Words::load(bytes));
  }

  int bits_;
  Words low_, high_, right_, left_, mask_;
};
