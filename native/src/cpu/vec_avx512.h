// Lanes<16> with AVX-512 (F, BW, DQ, VL); the narrower ones are those of vec_avx2.h, which comes before it. Included
// inside an anonymous namespace.

template <>
struct Lanes<16> {
  __m512 v;
  static Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes broadcast_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_set1_epi16(int16_t(*p)))}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(load_256(p))}; }
  static Lanes load_bf16(const uint16_t* p) { return widen_bf16(load_256(p)); }
  static Lanes widen_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
  static Lanes load_i8(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes<16>(p)))}; }
  static Lanes load_u4(const uint8_t* p, int shift) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(half_bytes<16>(p, shift)))};
  }
  static Lanes load_u5(const uint8_t* p, int shift, uint32_t fifth) {
    const __m128i bytes = _mm_or_si128(half_bytes<16>(p, shift), fifth_bits(fifth));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

 private:
  static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
};

VPTQ_OPERATIONS(16, _mm512)

inline Lanes<16> round(Lanes<16> x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Lanes<16> pow2(Lanes<16> x) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(x.v), _mm512_set1_epi32(127)), 23))};
}
inline float sum(Lanes<16> x) {
  return sum(Lanes<8>{_mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1))});
}

struct Words {
  static constexpr int kCount = 16;
  // A vector of numbers, not of bits as __m512i: GCC keeps arrays of those in memory, not in registers.
  using Vector = int32_t __attribute__((vector_size(64)));
  Vector v;
  static Words broadcast(uint32_t x) { return {Vector(_mm512_set1_epi32(int(x)))}; }
  static Words load(const void* p) { return {Vector(_mm512_loadu_si512(p))}; }
  void store(uint32_t* p) const { _mm512_storeu_si512(p, __m512i(v)); }
};
inline Words permute(Words x, Words i) { return {Words::Vector(_mm512_permutexvar_epi32(__m512i(i.v), __m512i(x.v)))}; }
inline Words operator>>(Words x, Words y) { return {Words::Vector(_mm512_srlv_epi32(__m512i(x.v), __m512i(y.v)))}; }
inline Words operator<<(Words x, Words y) { return {Words::Vector(_mm512_sllv_epi32(__m512i(x.v), __m512i(y.v)))}; }
inline Words operator|(Words x, Words y) { return {Words::Vector(_mm512_or_si512(__m512i(x.v), __m512i(y.v)))}; }
inline Words operator&(Words x, Words y) { return {Words::Vector(_mm512_and_si512(__m512i(x.v), __m512i(y.v)))}; }
inline Words operator*(Words x, Words y) { return {Words::Vector(_mm512_mullo_epi32(__m512i(x.v), __m512i(y.v)))}; }

// To the nearest whole number; 0x80000000 for NaN.
inline Words to_words(Lanes<16> x) { return {Words::Vector(_mm512_cvtps_epi32(x.v))}; }
inline Lanes<16> to_lanes(Words x) { return {_mm512_cvtepi32_ps(__m512i(x.v))}; }
// acc + the low halves' product + the high halves' product, of signed numbers.
inline Words add_products(Words acc, Words x, Words y) {
#ifdef __AVX512VNNI__
  return {Words::Vector(_mm512_dpwssd_epi32(__m512i(acc.v), __m512i(x.v), __m512i(y.v)))};
#else
  return {Words::Vector(_mm512_add_epi32(__m512i(acc.v), _mm512_madd_epi16(__m512i(x.v), __m512i(y.v))))};
#endif
}

// Two blocks of 8 or of 6 side by side, or one of 12; see kernels/codebook.h. Six weights are loaded as eight.
template <int First>
struct TwoBlocks {
  static constexpr int kCount = 2, kStride = 8, kFirst = First;
  using Sums = Lanes<16>;
  static Sums load(const float* const* p) {
    const __m256 low = _mm256_loadu_ps(p[0] - First), high = _mm256_loadu_ps(p[1] - First);
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
  static Sums load_f16(const uint16_t* const* p) { return {_mm512_cvtph_ps(halves(p))}; }
  static Sums load_bf16(const uint16_t* const* p) { return Sums::widen_bf16(halves(p)); }

 private:
  static __m256i halves(const uint16_t* const* p) {
    const __m256i low = _mm256_castsi128_si256(load_bytes<16>(p[0] - First));
    return _mm256_inserti128_si256(low, load_bytes<16>(p[1] - First), 1);
  }
};
template <>
struct Blocks<8> : TwoBlocks<0> {};
template <>
struct Blocks<6> : TwoBlocks<2> {};
template <>
struct Blocks<12> {
  static constexpr int kCount = 1, kStride = 16, kFirst = 0;
  using Sums = Lanes<16>;
  static Sums load(const float* const* p) { return {_mm512_maskz_loadu_ps(kMask, p[0])}; }
  static Sums load_f16(const uint16_t* const* p) { return {_mm512_cvtph_ps(halves(p))}; }
  static Sums load_bf16(const uint16_t* const* p) { return Sums::widen_bf16(halves(p)); }

 private:
  static constexpr __mmask16 kMask = (1 << 12) - 1;  // what is masked off is not read
  static __m256i halves(const uint16_t* const* p) { return _mm256_maskz_loadu_epi16(kMask, p[0]); }
};
