// Lanes<4>, <2>, <1> with NEON as every aarch64 processor has it. Included inside an anonymous namespace, after
// vec_compose.h; vec_generic.h says what each function does.

template <class T>
T load_as(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

// Four bits of each of eight bytes, from bit `shift` on, 0 or 4, with a fifth one above them, bit i of `fifth` for byte
// i: as 16-bit numbers.
inline uint16x8_t five_bits(uint8x8_t bytes, int shift, uint32_t fifth) {
  const uint8x8_t which = vcreate_u8(0x8040201008040201);
  const uint8x8_t high = vand_u8(vtst_u8(vdup_n_u8(uint8_t(fifth)), which), vdup_n_u8(16));
  return vmovl_u8(vorr_u8(vand_u8(vshl_u8(bytes, vdup_n_s8(int8_t(-shift))), vdup_n_u8(15)), high));
}

template <>
struct Lanes<4> {
  float32x4_t v;
  static Lanes broadcast(float x) { return {vdupq_n_f32(x)}; }
  static Lanes broadcast_f16(const uint16_t* p) { return broadcast(float(load_as<float16_t>(p))); }
  static Lanes load(const float* p) { return {load_as<float32x4_t>(p)}; }
  static Lanes load_f16(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(load_as<uint16x4_t>(p)))}; }
  static Lanes load_bf16(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(load_as<uint16x4_t>(p), 16))}; }
  static Lanes load_i8(const int8_t* p) {
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(load_as<uint32_t>(p))))))};
  }
  static Lanes load_u4(const uint8_t* p, int shift) { return load_u5(p, shift, 0); }
  static Lanes load_u5(const uint8_t* p, int shift, uint32_t fifth) {
    const uint16x8_t numbers = five_bits(vcreate_u8(load_as<uint32_t>(p)), shift, fifth);
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(numbers)))};
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_f16(uint16_t* p) const { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
};

// Eight are two of four, but loaded at once.
template <>
inline Lanes<8> Lanes<8>::load_f16(const uint16_t* p) {
  const auto eight = load_as<float16x8_t>(p);
  return {{vcvt_f32_f16(vget_low_f16(eight))}, {vcvt_high_f32_f16(eight)}};
}
template <>
inline Lanes<8> Lanes<8>::load_bf16(const uint16_t* p) {
  const auto eight = load_as<uint16x8_t>(p);
  return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(eight), 16))},
          {vreinterpretq_f32_u32(vshll_high_n_u16(eight, 16))}};
}
template <>
inline Lanes<8> Lanes<8>::load_i8(const int8_t* p) {
  const int16x8_t eight = vmovl_s8(load_as<int8x8_t>(p));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(eight)))}, {vcvtq_f32_s32(vmovl_high_s16(eight))}};
}
template <>
inline Lanes<8> Lanes<8>::load_u5(const uint8_t* p, int shift, uint32_t fifth) {
  const uint16x8_t eight = five_bits(load_as<uint8x8_t>(p), shift, fifth);
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(eight)))}, {vcvtq_f32_u32(vmovl_high_u16(eight))}};
}
template <>
inline Lanes<8> Lanes<8>::load_u4(const uint8_t* p, int shift) {
  return load_u5(p, shift, 0);
}

template <>
struct Lanes<2> {
  float32x2_t v;
  static Lanes broadcast(float x) { return {vdup_n_f32(x)}; }
  static Lanes broadcast_f16(const uint16_t* p) { return broadcast(float(load_as<float16_t>(p))); }
  static Lanes load(const float* p) { return {load_as<float32x2_t>(p)}; }
  static Lanes load_f16(const uint16_t* p) {
    return {vget_low_f32(vcvt_f32_f16(vreinterpret_f16_u16(vcreate_u16(load_as<uint32_t>(p)))))};
  }
  static Lanes load_bf16(const uint16_t* p) {
    return {vget_low_f32(vreinterpretq_f32_u32(vshll_n_u16(vcreate_u16(load_as<uint32_t>(p)), 16)))};
  }
  static Lanes load_i8(const int8_t* p) { return {float32x2_t{float(p[0]), float(p[1])}}; }
  static Lanes load_u4(const uint8_t* p, int shift) { return load_u5(p, shift, 0); }
  static Lanes load_u5(const uint8_t* p, int shift, uint32_t fifth) {
    return {float32x2_t{float((p[0] >> shift & 15) | (fifth & 1) << 4),
                        float((p[1] >> shift & 15) | (fifth >> 1 & 1) << 4)}};
  }
  void store(float* p) const { vst1_f32(p, v); }
  void store_f16(uint16_t* p) const {
    const uint32_t two = vget_lane_u32(vreinterpret_u32_f16(vcvt_f16_f32(vcombine_f32(v, v))), 0);
    __builtin_memcpy(p, &two, 4);
  }
};

template <>
struct Lanes<1> {
  float v;
  static Lanes broadcast(float x) { return {x}; }
  static Lanes broadcast_f16(const uint16_t* p) { return broadcast(float(load_as<float16_t>(p))); }
  static Lanes load(const float* p) { return {*p}; }
  static Lanes load_f16(const uint16_t* p) { return {float(load_as<float16_t>(p))}; }
  static Lanes load_bf16(const uint16_t* p) { return {from_bits(uint32_t(*p) << 16)}; }
  static Lanes load_i8(const int8_t* p) { return {float(*p)}; }
  static Lanes load_u4(const uint8_t* p, int shift) { return load_u5(p, shift, 0); }
  static Lanes load_u5(const uint8_t* p, int shift, uint32_t fifth) {
    return {float((*p >> shift & 15) | (fifth & 1) << 4)};
  }
  void store(float* p) const { *p = v; }
  void store_f16(uint16_t* p) const {
    const auto h = float16_t(v);
    __builtin_memcpy(p, &h, 2);
  }
};

// The operations of one width, by what its intrinsics have after their names. Their minimum and maximum would be NaN
// where either is.
#define VPTQ_OPERATIONS(N, Q)                                                                                         \
  inline Lanes<N> operator+(Lanes<N> x, Lanes<N> y) { return {x.v + y.v}; }                                           \
  inline Lanes<N> operator-(Lanes<N> x, Lanes<N> y) { return {x.v - y.v}; }                                           \
  inline Lanes<N> operator*(Lanes<N> x, Lanes<N> y) { return {x.v * y.v}; }                                           \
  inline Lanes<N> operator/(Lanes<N> x, Lanes<N> y) { return {x.v / y.v}; }                                           \
  inline Lanes<N> min(Lanes<N> x, Lanes<N> y) { return {vbsl##Q##_f32(vclt##Q##_f32(x.v, y.v), x.v, y.v)}; }          \
  inline Lanes<N> max(Lanes<N> x, Lanes<N> y) { return {vbsl##Q##_f32(vcgt##Q##_f32(x.v, y.v), x.v, y.v)}; }          \
  inline Lanes<N> fma(Lanes<N> x, Lanes<N> y, Lanes<N> z) { return {vfma##Q##_f32(z.v, x.v, y.v)}; }                  \
  inline Lanes<N> round(Lanes<N> x) { return {vrndn##Q##_f32(x.v)}; }                                                 \
  inline Lanes<N> pow2(Lanes<N> x) {                                                                                  \
    return {                                                                                                          \
        vreinterpret##Q##_f32_s32(vshl##Q##_n_s32(vadd##Q##_s32(vcvt##Q##_s32_f32(x.v), vdup##Q##_n_s32(127)), 23))}; \
  }                                                                                                                   \
  inline float sum(Lanes<N> x) { return vaddv##Q##_f32(x.v); }

VPTQ_OPERATIONS(4, q)
VPTQ_OPERATIONS(2, )
#undef VPTQ_OPERATIONS

inline Lanes<1> operator+(Lanes<1> x, Lanes<1> y) { return {x.v + y.v}; }
inline Lanes<1> operator-(Lanes<1> x, Lanes<1> y) { return {x.v - y.v}; }
inline Lanes<1> operator*(Lanes<1> x, Lanes<1> y) { return {x.v * y.v}; }
inline Lanes<1> operator/(Lanes<1> x, Lanes<1> y) { return {x.v / y.v}; }
inline Lanes<1> min(Lanes<1> x, Lanes<1> y) { return x.v < y.v ? x : y; }
inline Lanes<1> max(Lanes<1> x, Lanes<1> y) { return x.v > y.v ? x : y; }
inline Lanes<1> fma(Lanes<1> x, Lanes<1> y, Lanes<1> z) { return {__builtin_fmaf(x.v, y.v, z.v)}; }
inline Lanes<1> round(Lanes<1> x) { return {vrndns_f32(x.v)}; }
inline Lanes<1> pow2(Lanes<1> x) { return {from_bits(uint32_t(vcvts_s32_f32(x.v) + 127) << 23)}; }
inline float sum(Lanes<1> x) { return x.v; }

template <int V>
struct Blocks;  // kernels/codebook.h

// Six weights loaded as eight.
template <>
struct Blocks<6> {
  static constexpr int kCount = 1, kStride = 8, kFirst = 2;
  using Sums = Lanes<8>;
  static Sums load(const float* const* p) { return Sums::load(p[0] - kFirst); }
  static Sums load_f16(const uint16_t* const* p) { return Sums::load_f16(p[0] - kFirst); }
  static Sums load_bf16(const uint16_t* const* p) { return Sums::load_bf16(p[0] - kFirst); }
};

// Two vectors: a multiple of 8 it has to be, and one table lookup reaches into both.
struct Words {
  static constexpr int kCount = 8;
  uint32x4_t lo, hi;
  static Words broadcast(uint32_t x) { return {vdupq_n_u32(x), vdupq_n_u32(x)}; }
  static Words load(const void* p) {
    const auto* words = static_cast<const uint32_t*>(p);
    return {load_as<uint32x4_t>(words), load_as<uint32x4_t>(words + 4)};
  }
  void store(uint32_t* p) const {
    vst1q_u32(p, lo);
    vst1q_u32(p + 4, hi);
  }
};
inline uint32x4_t permute(Words x, uint32x4_t i) {
  const uint32x4_t bytes = i * 0x04040404 + 0x03020100;  // of word i: 4 i, 4 i + 1, ...
  const uint8x16x2_t table = {{vreinterpretq_u8_u32(x.lo), vreinterpretq_u8_u32(x.hi)}};
  return vreinterpretq_u32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes)));
}
inline Words permute(Words x, Words i) { return {permute(x, i.lo), permute(x, i.hi)}; }
inline Words operator>>(Words x, Words y) {
  return {vshlq_u32(x.lo, -vreinterpretq_s32_u32(y.lo)), vshlq_u32(x.hi, -vreinterpretq_s32_u32(y.hi))};
}
inline Words operator<<(Words x, Words y) {
  return {vshlq_u32(x.lo, vreinterpretq_s32_u32(y.lo)), vshlq_u32(x.hi, vreinterpretq_s32_u32(y.hi))};
}
inline Words operator|(Words x, Words y) { return {x.lo | y.lo, x.hi | y.hi}; }
inline Words operator&(Words x, Words y) { return {x.lo & y.lo, x.hi & y.hi}; }
inline Words operator*(Words x, Words y) { return {x.lo * y.lo, x.hi * y.hi}; }

inline uint32x4_t to_words(float32x4_t x) {
  const uint32x4_t fits = vcaltq_f32(x, vdupq_n_f32(0x1p31f));
  return vbslq_u32(fits, vreinterpretq_u32_s32(vcvtnq_s32_f32(x)), vdupq_n_u32(0x80000000));
}
inline Words to_words(Lanes<8> x) { return {to_words(x.lo.v), to_words(x.hi.v)}; }
inline Lanes<8> to_lanes(Words x) {
  return {{vcvtq_f32_s32(vreinterpretq_s32_u32(x.lo))}, {vcvtq_f32_s32(vreinterpretq_s32_u32(x.hi))}};
}
// The halves are taken apart here: for x and y that serve several sums the compiler does it once.
inline uint32x4_t add_products(uint32x4_t acc, uint32x4_t x, uint32x4_t y) {
  const auto low = [](uint32x4_t words) { return vreinterpret_s16_u16(vmovn_u32(words)); };
  const auto high = [](uint32x4_t words) { return vreinterpret_s16_u16(vshrn_n_u32(words, 16)); };
  const int32x4_t with_low = vmlal_s16(vreinterpretq_s32_u32(acc), low(x), low(y));
  return vreinterpretq_u32_s32(vmlal_s16(with_low, high(x), high(y)));
}
inline Words add_products(Words acc, Words x, Words y) {
  return {add_products(acc.lo, x.lo, y.lo), add_products(acc.hi, x.hi, y.hi)};
}
