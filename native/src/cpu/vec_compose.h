// Lanes<N> of a width that the processor does not have, as two narrower ones side by side: Lanes<12> is 8 + 4.
// The processor's own widths are specialisations. Included inside an anonymous namespace.

constexpr int lower_part(int n) { return n > 16 ? 16 : n > 8 ? 8 : n > 4 ? 4 : n > 2 ? 2 : 1; }

template <int N>
struct Lanes {
  static constexpr int L = lower_part(N), H = N - L;
  Lanes<L> lo;
  Lanes<H> hi;

  static Lanes broadcast(float x) { return {Lanes<L>::broadcast(x), Lanes<H>::broadcast(x)}; }
  static Lanes broadcast_f16(const uint16_t* p) { return {Lanes<L>::broadcast_f16(p), Lanes<H>::broadcast_f16(p)}; }
  static Lanes load(const float* p) { return {Lanes<L>::load(p), Lanes<H>::load(p + L)}; }
  static Lanes load_f16(const uint16_t* p) { return {Lanes<L>::load_f16(p), Lanes<H>::load_f16(p + L)}; }
  static Lanes load_bf16(const uint16_t* p) { return {Lanes<L>::load_bf16(p), Lanes<H>::load_bf16(p + L)}; }
  static Lanes load_i8(const int8_t* p) { return {Lanes<L>::load_i8(p), Lanes<H>::load_i8(p + L)}; }
  static Lanes load_u4(const uint8_t* p, int shift) {
    return {Lanes<L>::load_u4(p, shift), Lanes<H>::load_u4(p + L, shift)};
  }
  static Lanes load_u5(const uint8_t* p, int shift, uint32_t fifth) {
    return {Lanes<L>::load_u5(p, shift, fifth), Lanes<H>::load_u5(p + L, shift, fifth >> L)};
  }
  void store(float* p) const {
    lo.store(p);
    hi.store(p + L);
  }
  void store_f16(uint16_t* p) const {
    lo.store_f16(p);
    hi.store_f16(p + L);
  }
};

template <int N>
Lanes<N> operator+(const Lanes<N>& x, const Lanes<N>& y) {
  return {x.lo + y.lo, x.hi + y.hi};
}
template <int N>
Lanes<N> operator-(const Lanes<N>& x, const Lanes<N>& y) {
  return {x.lo - y.lo, x.hi - y.hi};
}
template <int N>
Lanes<N> operator*(const Lanes<N>& x, const Lanes<N>& y) {
  return {x.lo * y.lo, x.hi * y.hi};
}
template <int N>
Lanes<N> operator/(const Lanes<N>& x, const Lanes<N>& y) {
  return {x.lo / y.lo, x.hi / y.hi};
}
template <int N>
Lanes<N> min(const Lanes<N>& x, const Lanes<N>& y) {
  return {min(x.lo, y.lo), min(x.hi, y.hi)};
}
template <int N>
Lanes<N> max(const Lanes<N>& x, const Lanes<N>& y) {
  return {max(x.lo, y.lo), max(x.hi, y.hi)};
}
template <int N>
Lanes<N> fma(const Lanes<N>& x, const Lanes<N>& y, const Lanes<N>& z) {
  return {fma(x.lo, y.lo, z.lo), fma(x.hi, y.hi, z.hi)};
}
template <int N>
Lanes<N> round(const Lanes<N>& x) {
  return {round(x.lo), round(x.hi)};
}
template <int N>
Lanes<N> pow2(const Lanes<N>& x) {
  return {pow2(x.lo), pow2(x.hi)};
}
template <int N>
float sum(const Lanes<N>& x) {
  return sum(x.lo) + sum(x.hi);
}
