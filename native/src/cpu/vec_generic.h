// Lanes<N>: N floats side by side, in plain C++. The specification of vec_*.h, built and tested everywhere.
// Included inside an anonymous namespace, once for each instruction set.

template <int N>
struct Lanes {
  float a[N];

  static Lanes broadcast(float x) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.a[i] = x;
    return r;
  }
  static Lanes broadcast_f16(const uint16_t* p) { return broadcast(f16_to_float(*p)); }
  static Lanes load(const float* p) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.a[i] = p[i];
    return r;
  }
  static Lanes load_f16(const uint16_t* p) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.a[i] = f16_to_float(p[i]);
    return r;
  }
  static Lanes load_bf16(const uint16_t* p) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.a[i] = from_bits(uint32_t(p[i]) << 16);
    return r;
  }
  static Lanes load_i8(const int8_t* p) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.a[i] = float(p[i]);
    return r;
  }
  // Four bits of each byte, from bit `shift` on, 0 or 4; with a fifth one above them, bit i of `fifth` for byte i.
  static Lanes load_u4(const uint8_t* p, int shift) { return load_u5(p, shift, 0); }
  static Lanes load_u5(const uint8_t* p, int shift, uint32_t fifth) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.a[i] = float((p[i] >> shift & 15) | (fifth >> i & 1) << 4);
    return r;
  }
  void store(float* p) const {
    for (int i = 0; i < N; ++i) p[i] = a[i];
  }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < N; ++i) p[i] = float_to_f16(a[i]);
  }
};

template <int N, class F>
Lanes<N> map(const Lanes<N>& x, const Lanes<N>& y, F f) {
  Lanes<N> r;
  for (int i = 0; i < N; ++i) r.a[i] = f(x.a[i], y.a[i]);
  return r;
}

template <int N>
Lanes<N> operator+(const Lanes<N>& x, const Lanes<N>& y) {
  return map(x, y, [](float p, float q) { return p + q; });
}
template <int N>
Lanes<N> operator-(const Lanes<N>& x, const Lanes<N>& y) {
  return map(x, y, [](float p, float q) { return p - q; });
}
template <int N>
Lanes<N> operator*(const Lanes<N>& x, const Lanes<N>& y) {
  return map(x, y, [](float p, float q) { return p * q; });
}
template <int N>
Lanes<N> operator/(const Lanes<N>& x, const Lanes<N>& y) {
  return map(x, y, [](float p, float q) { return p / q; });
}

// The second where either is NaN, as the x86 instructions do.
template <int N>
Lanes<N> min(const Lanes<N>& x, const Lanes<N>& y) {
  return map(x, y, [](float p, float q) { return p < q ? p : q; });
}
template <int N>
Lanes<N> max(const Lanes<N>& x, const Lanes<N>& y) {
  return map(x, y, [](float p, float q) { return p > q ? p : q; });
}

// x * y + z; here rounded twice, where the hardware has it once.
template <int N>
Lanes<N> fma(const Lanes<N>& x, const Lanes<N>& y, const Lanes<N>& z) {
  return x * y + z;
}

// To the nearest integer, halves to even.
template <int N>
Lanes<N> round(const Lanes<N>& x) {
  return map(x, x, [](float p, float) { return __builtin_rintf(p); });
}

// 2^x for integers from -126 to 127.
template <int N>
Lanes<N> pow2(const Lanes<N>& x) {
  return map(x, x, [](float p, float) { return from_bits(uint32_t(int32_t(p) + 127) << 23); });
}

template <int N>
float sum(const Lanes<N>& x) {
  float total = 0;
  for (int i = 0; i < N; ++i) total += x.a[i];
  return total;
}

// Whole numbers side by side, as many as the processor's vector holds, but a multiple of 8.
struct Words {
  static constexpr int kCount = 8;
  uint32_t a[kCount];

  static Words broadcast(uint32_t x) {
    Words r;
    for (uint32_t& word : r.a) word = x;
    return r;
  }
  static Words load(const void* p) {
    Words r;
    __builtin_memcpy(r.a, p, sizeof(r.a));
    return r;
  }
  void store(uint32_t* p) const { __builtin_memcpy(p, a, sizeof(a)); }
};

template <class F>
Words map(const Words& x, const Words& y, F f) {
  Words r;
  for (int i = 0; i < Words::kCount; ++i) r.a[i] = f(x.a[i], y.a[i]);
  return r;
}

// x[i[0]], x[i[1]], ...
inline Words permute(const Words& x, const Words& i) {
  Words r;
  for (int k = 0; k < Words::kCount; ++k) r.a[k] = x.a[i.a[k]];
  return r;
}
// Shifts by as many bits as y says, in each place; by 32 there is nothing left.
inline Words operator>>(const Words& x, const Words& y) {
  return map(x, y, [](uint32_t p, uint32_t q) { return q < 32 ? p >> q : 0; });
}
inline Words operator<<(const Words& x, const Words& y) {
  return map(x, y, [](uint32_t p, uint32_t q) { return q < 32 ? p << q : 0; });
}
inline Words operator|(const Words& x, const Words& y) {
  return map(x, y, [](uint32_t p, uint32_t q) { return p | q; });
}
inline Words operator&(const Words& x, const Words& y) {
  return map(x, y, [](uint32_t p, uint32_t q) { return p & q; });
}
inline Words operator*(const Words& x, const Words& y) {
  return map(x, y, [](uint32_t p, uint32_t q) { return p * q; });
}

// To the nearest whole number, halves to even; 0x80000000 for what does not fit and for NaN, as the x86 instruction
// does.
inline Words to_words(const Lanes<Words::kCount>& x) {
  Words r;
  for (int i = 0; i < Words::kCount; ++i) {
    const bool fits = x.a[i] >= -0x1p31f && x.a[i] < 0x1p31f;
    r.a[i] = fits ? uint32_t(int32_t(__builtin_rintf(x.a[i]))) : 0x80000000u;
  }
  return r;
}
inline Lanes<Words::kCount> to_lanes(const Words& x) {
  Lanes<Words::kCount> r;
  for (int i = 0; i < Words::kCount; ++i) r.a[i] = float(int32_t(x.a[i]));
  return r;
}
// acc + the low halves' product + the high halves' product, of signed numbers.
inline Words add_products(const Words& acc, const Words& x, const Words& y) {
  Words r;
  for (int i = 0; i < Words::kCount; ++i)
    r.a[i] = acc.a[i] + uint32_t(int16_t(x.a[i]) * int16_t(y.a[i])) +
             uint32_t(int16_t(x.a[i] >> 16) * int16_t(y.a[i] >> 16));
  return r;
}
