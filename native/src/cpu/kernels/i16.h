// Several tokens' activations and a tile's weights in 16-bit integers. Included inside an anonymous namespace, after
// vq_many.h.
//
// x = x_step * whole number, with a step for each token and tile of columns, and w = w_step * whole number, with a step
// for each codebook. A tile's 32-bit sums of products cannot overflow, as the magnitudes of a tile's x add up to kMostX
// at most: so they are exact, and the root mean square error of the x is at most 0.03 % of the x's own in a tile,
// whatever their distribution (step / sqrt(12), the step kTileColumns * rms / kMostX or less).

constexpr int kMostW = 16383;                                       // the largest whole number of a weight
constexpr int kMostX = 0x7fffffff / kMostW - kTileColumns / 2 - 1;  // less what rounding up can add
constexpr int kI16Most = 32767;
constexpr float kSmallestStep = 1e-30f;  // less counts as nothing

// A token's activations of the columns as round_columns() leaves them: for each group its numbers in pairs, the first
// in the low half of a word; then for each group and tile the step.
inline int64_t group_pairs(const VqColumns& c) { return (c.group_size + 1) / 2; }
inline int64_t group_tiles(const VqColumns& c) { return (c.group_size + kTileColumns - 1) / kTileColumns; }

int64_t i16_size(const VqColumns& c) { return c.n_groups * (group_pairs(c) + group_tiles(c)); }

inline float largest_lane(Lanes<kVector> x) {
  float lanes[kVector], largest = 0;
  x.store(lanes);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// The whole numbers nearest to x / step; for NaN one whose low half is 0.
inline Words whole_numbers(const float* x, float step) {
  return to_words(Lanes<kVector>::load(x) * Lanes<kVector>::broadcast(step > kSmallestStep ? 1 / step : 0));
}

// Pairs of whole numbers, the first in the low half.
inline Words pairs(Words first, Words second) {
  return (first & Words::broadcast(0xffff)) | second << Words::broadcast(16);
}

// One token's x, from the first of the columns on. Where there is NaN or infinity, the step is that.
void round_columns(const VqColumns& c, const float* x, float* words) {
  using L = Lanes<kVector>;
  float* steps = words + c.n_groups * group_pairs(c);
  for (int q = 0; q < c.n_groups; ++q)
    for (int j0 = 0; j0 < c.group_size; j0 += kTileColumns) {
      const int n = c.group_size - j0 < kTileColumns ? c.group_size - j0 : kTileColumns;
      alignas(64) float tile[kTileColumns];
      __builtin_memset(tile, 0, sizeof(tile));
      __builtin_memcpy(tile, x + int64_t{q} * c.group_size + j0, size_t(n) * sizeof(float));
      L largest = L::broadcast(0), total = L::broadcast(0);
      for (int j = 0; j < kTileColumns; j += kVector) {
        const L v = L::load(tile + j), magnitude = max(v, L::broadcast(0) - v);
        largest = max(largest, magnitude);
        total = fma(magnitude, L::broadcast(1.0f / kMostX), total);  // the quotient cannot overflow
      }
      const float by_total = sum(total), by_largest = largest_lane(largest) / kI16Most;
      const float step = by_largest > by_total ? by_largest : by_total;  // NaN stays, infinity too
      *steps++ = step;
      alignas(64) uint32_t whole[kTileColumns];
      for (int j = 0; j < kTileColumns; j += kVector) whole_numbers(tile + j, step).store(whole + j);
      float* to = words + q * group_pairs(c) + j0 / 2;
      for (int j = 0; j < n; j += 2) to[j / 2] = from_bits((whole[j] & 0xffff) | whole[j + 1] << 16);
    }
}

struct Magnitudes {
  float largest, mean_square;
};

template <class Centroids>
Magnitudes magnitudes(const std::byte* numbers, int64_t n) {
  const auto* p = reinterpret_cast<const typename Centroids::Element*>(numbers);
  using L = Lanes<kVector>;
  L largest = L::broadcast(0), squares = L::broadcast(0);
  int64_t i = 0;
  const auto add = [&](L x) {
    largest = max(largest, max(x, L::broadcast(0) - x));
    squares = fma(x, x, squares);
  };
  for (; i + kVector <= n; i += kVector, p += kVector) add(Centroids::template load<Block<kVector>>(&p));
  float lanes[kVector] = {};
  for (int lane = 0; i < n; ++i, ++lane, ++p) lanes[lane] = sum(Centroids::template load<Block<1>>(&p));
  add(L::load(lanes));
  return {largest_lane(largest), sum(squares) / float(n)};
}

// With this the root mean square error of a weight is at most 0.06 % of a typical one.
constexpr float kMostOfTypical = 32;  // times the root mean square that the largest weight may be

float i16_step(const VqColumns& c, int group) {
  if (!has_kernel(c.v)) return 0;
  const auto of = with_centroids(c, []<class Centroids>() { return magnitudes<Centroids>; });
  const int64_t bytes = c.v * (c.type == DType::f32 ? 4 : 2);
  const Magnitudes main = of(c.centroids + int64_t{group} * c.k * bytes, int64_t{c.k} * c.v);
  Magnitudes res{0, 0};
  if (c.r) res = of(c.res_centroids + int64_t{group} * c.r * bytes, int64_t{c.r} * c.v);
  const float largest = main.largest + res.largest;
  const float typical = __builtin_sqrtf(main.mean_square + res.mean_square);
  const float step = largest / kMostW;
  const bool fits = largest <= kMostOfTypical * typical && typical < __builtin_huge_valf();
  return fits && step > kSmallestStep ? step : 0;
}

struct I16Activations {
  const float* x;  // (n_tokens, stride), a token's words as round_columns() leaves them
  int64_t stride;
  const float* w_steps;  // (n_groups)

  I16Activations from(int t) const { return {x + t * stride, stride, w_steps}; }

  template <int Rows, class LookUp>
  void multiply(const VqColumns& c, int group, int j0, int n, int n_tokens, LookUp look_up, float (*sums)[Rows]) const {
    constexpr int kLooked = 16;  // columns: their floats lie in L1 beside the codebook and w
    static_assert(kTileColumns % kLooked == 0 && kTileColumns % kVector == 0);
    alignas(64) float looked[kLooked][Rows] = {};
    alignas(64) uint32_t w[kTileColumns / 2][Rows];
    for (int j = 0; j < n; j += kLooked) {
      look_up(j, n - j < kLooked ? n : j + kLooked, looked);
      for (int i = 0; i < kLooked && j + i < n; i += 2)  // where n is odd, the second x of the last pair is 0
        for (int row = 0; row < Rows; row += kVector)
          pairs(whole_numbers(looked[i] + row, w_steps[group]), whole_numbers(looked[i + 1] + row, w_steps[group]))
              .store(w[(j + i) / 2] + row);
    }
    const float* xs = x + group * group_pairs(c) + j0 / 2;
    const float* steps = x + c.n_groups * group_pairs(c) + group * group_tiles(c) + j0 / kTileColumns;
    share_registers<Rows>(n_tokens, [&]<int T, int P>(int t0, int row) {
      Words acc[T][P];
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < P; ++i) acc[t][i] = Words::broadcast(0);
      for (int j = 0; j < (n + 1) / 2; ++j) {
        Words wj[P];
        for (int i = 0; i < P; ++i) wj[i] = Words::load(w[j] + row + i * kVector);
        for (int t = 0; t < T; ++t) {
          const Words xj = Words::broadcast(to_bits(xs[(t0 + t) * stride + j]));
          for (int i = 0; i < P; ++i) acc[t][i] = add_products(acc[t][i], xj, wj[i]);
        }
      }
      for (int t = 0; t < T; ++t) {
        const auto step = Lanes<kVector>::broadcast(steps[(t0 + t) * stride] * w_steps[group]);
        for (int i = 0; i < P; ++i) {
          float* sum = sums[t0 + t] + row + i * kVector;
          fma(to_lanes(acc[t][i]), step, Lanes<kVector>::load(sum)).store(sum);
        }
      }
    });
  }
};
