// Lanes<8>, <4>, <2>, <1> with AVX2, FMA and F16C. Included inside an anonymous namespace; vec_generic.h says what each
// function does.

#define VPTQ_VEC_128(N)                                                                                      \
  template <>                                                                                                \
  struct Lanes<N> {                                                                                          \
    __m128 v;                                                                                                \
    static Lanes broadcast(float x) { return {_mm_set1_ps(x)}; }                                             \
    static Lanes broadcast_f16(const uint16_t* p) { return {_mm_cvtph_ps(_mm_set1_epi16(int16_t(*p)))}; }    \
    static Lanes load(const float* p) { return {_mm_castsi128_ps(load_bytes<4 * N>(p))}; }                   \
    static Lanes load_f16(const uint16_t* p) { return {_mm_cvtph_ps(load_bytes<2 * N>(p))}; }                \
    static Lanes load_bf16(const uint16_t* p) {                                                              \
      return {_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(load_bytes<2 * N>(p)), 16))};               \
    }                                                                                                        \
    static Lanes load_i8(const int8_t* p) { return {_mm_cvtepi32_ps(_mm_cvtepi8_epi32(load_bytes<N>(p)))}; } \
    static Lanes load_u4(const uint8_t* p, int shift) {                                                      \
      return {_mm_cvtepi32_ps(_mm_cvtepu8_epi32(half_bytes<N>(p, shift)))};                                  \
    }                                                                                                        \
    static Lanes load_u5(const uint8_t* p, int shift, uint32_t fifth) {                                      \
      const __m128i bytes = _mm_or_si128(half_bytes<N>(p, shift), fifth_bits(fifth));                        \
      return {_mm_cvtepi32_ps(_mm_cvtepu8_epi32(bytes))};                                                    \
    }                                                                                                        \
    void store(float* p) const { store_bytes<4 * N>(p, _mm_castps_si128(v)); }                               \
    void store_f16(uint16_t* p) const { store_bytes<2 * N>(p, _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); } \
  };

template <int Bytes>
__m128i load_bytes(const void* p) {
  if constexpr (Bytes == 16) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  if constexpr (Bytes == 8) return _mm_loadl_epi64(static_cast<const __m128i*>(p));
  int32_t low = 0;
  __builtin_memcpy(&low, p, Bytes < 4 ? Bytes : 4);
  return _mm_cvtsi32_si128(low);
}

// Four bits of each byte, from bit `shift` on, 0 or 4.
template <int Bytes>
__m128i half_bytes(const void* p, int shift) {
  const __m128i bytes = load_bytes<Bytes>(p);
  return _mm_and_si128(shift ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15));
}

// Bit i becomes byte i, 0 or 16.
inline __m128i fifth_bits(uint32_t bits) {
#ifdef __AVX512BW__
  return _mm_maskz_set1_epi8(__mmask16(bits), 16);
#else
  const __m128i which = _mm_set1_epi64x(int64_t(0x8040201008040201));
  const __m128i first = _mm_cvtsi32_si128(0), second = _mm_set1_epi8(1);
  const __m128i spread = _mm_shuffle_epi8(_mm_cvtsi32_si128(int(bits)), _mm_unpacklo_epi64(first, second));
  return _mm_and_si128(_mm_cmpeq_epi8(_mm_and_si128(spread, which), which), _mm_set1_epi8(16));
#endif
}

template <int Bytes>
void store_bytes(void* p, __m128i v) {
  if constexpr (Bytes == 16) {
    _mm_storeu_si128(static_cast<__m128i*>(p), v);
  } else {
    const int64_t low = _mm_cvtsi128_si64(v);
    __builtin_memcpy(p, &low, Bytes);
  }
}

VPTQ_VEC_128(1)
VPTQ_VEC_128(2)
VPTQ_VEC_128(4)
#undef VPTQ_VEC_128

template <>
struct Lanes<8> {
  __m256 v;
  static Lanes broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Lanes broadcast_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_set1_epi16(int16_t(*p)))}; }
  static Lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Lanes load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_bytes<16>(p))}; }
  static Lanes load_bf16(const uint16_t* p) { return widen_bf16(load_bytes<16>(p)); }
  static Lanes widen_bf16(__m128i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
  static Lanes load_i8(const int8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_bytes<8>(p)))}; }
  static Lanes load_u4(const uint8_t* p, int shift) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(half_bytes<8>(p, shift)))};
  }
  static Lanes load_u5(const uint8_t* p, int shift, uint32_t fifth) {
    const __m128i bytes = _mm_or_si128(half_bytes<8>(p, shift), fifth_bits(fifth));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_f16(uint16_t* p) const { store_bytes<16>(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
};

// The operations of one width, by the prefix of its intrinsics.
#define VPTQ_OPERATIONS(N, P)                                                          \
  inline Lanes<N> operator+(Lanes<N> x, Lanes<N> y) { return {P##_add_ps(x.v, y.v)}; } \
  inline Lanes<N> operator-(Lanes<N> x, Lanes<N> y) { return {P##_sub_ps(x.v, y.v)}; } \
  inline Lanes<N> operator*(Lanes<N> x, Lanes<N> y) { return {P##_mul_ps(x.v, y.v)}; } \
  inline Lanes<N> operator/(Lanes<N> x, Lanes<N> y) { return {P##_div_ps(x.v, y.v)}; } \
  inline Lanes<N> min(Lanes<N> x, Lanes<N> y) { return {P##_min_ps(x.v, y.v)}; }       \
  inline Lanes<N> max(Lanes<N> x, Lanes<N> y) { return {P##_max_ps(x.v, y.v)}; }       \
  inline Lanes<N> fma(Lanes<N> x, Lanes<N> y, Lanes<N> z) { return {P##_fmadd_ps(x.v, y.v, z.v)}; }

#define VPTQ_OPERATIONS_128(N)                                                                                     \
  VPTQ_OPERATIONS(N, _mm)                                                                                          \
  inline Lanes<N> round(Lanes<N> x) { return {_mm_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; } \
  inline Lanes<N> pow2(Lanes<N> x) {                                                                               \
    return {_mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(x.v), _mm_set1_epi32(127)), 23))};       \
  }

VPTQ_OPERATIONS_128(1)
VPTQ_OPERATIONS_128(2)
VPTQ_OPERATIONS_128(4)
VPTQ_OPERATIONS(8, _mm256)
#undef VPTQ_OPERATIONS_128

inline Lanes<8> round(Lanes<8> x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lanes<8> pow2(Lanes<8> x) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x.v), _mm256_set1_epi32(127)), 23))};
}

inline float sum(Lanes<1> x) { return _mm_cvtss_f32(x.v); }
inline float sum(Lanes<2> x) { return _mm_cvtss_f32(_mm_add_ss(x.v, _mm_movehdup_ps(x.v))); }
inline float sum(Lanes<4> x) { return sum(Lanes<2>{_mm_add_ps(x.v, _mm_movehl_ps(x.v, x.v))}); }
inline float sum(Lanes<8> x) {
  return sum(Lanes<4>{_mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1))});
}

template <int V>
struct Blocks;  // kernels/codebook.h

// Two blocks of 4 side by side.
template <>
struct Blocks<4> {
  static constexpr int kCount = 2, kStride = 4, kFirst = 0;
  using Sums = Lanes<8>;
  static Sums load(const float* const* p) {
    return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p[0])), _mm_loadu_ps(p[1]), 1)};
  }
  static Sums load_f16(const uint16_t* const* p) { return {_mm256_cvtph_ps(halves(p))}; }
  static Sums load_bf16(const uint16_t* const* p) { return Sums::widen_bf16(halves(p)); }

 private:
  static __m128i halves(const uint16_t* const* p) {
    return _mm_unpacklo_epi64(load_bytes<8>(p[0]), load_bytes<8>(p[1]));
  }
};

#ifndef __AVX512F__  // where it is there, vec_avx512.h has wider ones

// Six weights loaded as eight.
template <>
struct Blocks<6> {
  static constexpr int kCount = 1, kStride = 8, kFirst = 2;
  using Sums = Lanes<8>;
  static Sums load(const float* const* p) { return Sums::load(p[0] - kFirst); }
  static Sums load_f16(const uint16_t* const* p) { return Sums::load_f16(p[0] - kFirst); }
  static Sums load_bf16(const uint16_t* const* p) { return Sums::load_bf16(p[0] - kFirst); }
};

struct Words {
  static constexpr int kCount = 8;
  // A vector of numbers, not of bits as __m256i: GCC keeps arrays of those in memory, not in registers.
  using Vector = int32_t __attribute__((vector_size(32)));
  Vector v;
  static Words broadcast(uint32_t x) { return {Vector(_mm256_set1_epi32(int(x)))}; }
  static Words load(const void* p) { return {Vector(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
  void store(uint32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), __m256i(v)); }
};
inline Words permute(Words x, Words i) {
  return {Words::Vector(_mm256_permutevar8x32_epi32(__m256i(x.v), __m256i(i.v)))};
}
inline Words operator>>(Words x, Words y) { return {Words::Vector(_mm256_srlv_epi32(__m256i(x.v), __m256i(y.v)))}; }
inline Words operator<<(Words x, Words y) { return {Words::Vector(_mm256_sllv_epi32(__m256i(x.v), __m256i(y.v)))}; }
inline Words operator|(Words x, Words y) { return {Words::Vector(_mm256_or_si256(__m256i(x.v), __m256i(y.v)))}; }
inline Words operator&(Words x, Words y) { return {Words::Vector(_mm256_and_si256(__m256i(x.v), __m256i(y.v)))}; }
inline Words operator*(Words x, Words y) { return {Words::Vector(_mm256_mullo_epi32(__m256i(x.v), __m256i(y.v)))}; }

inline Words to_words(Lanes<8> x) { return {Words::Vector(_mm256_cvtps_epi32(x.v))}; }
inline Lanes<8> to_lanes(Words x) { return {_mm256_cvtepi32_ps(__m256i(x.v))}; }
inline Words add_products(Words acc, Words x, Words y) {
#ifdef __AVXVNNI__
  return {Words::Vector(_mm256_dpwssd_avx_epi32(__m256i(acc.v), __m256i(x.v), __m256i(y.v)))};
#else
  return {Words::Vector(_mm256_add_epi32(__m256i(acc.v), _mm256_madd_epi16(__m256i(x.v), __m256i(y.v))))};
#endif
}

#endif
