// 16-bit floats, as bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace vptq::cuda::emulation {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, rest = h & 0x7fffu;
  if (rest > 0x7c00) return std::bit_cast<float>(0x7fffffffu);  // a NaN, as the device has it
  if (rest == 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u);
  const float value = std::bit_cast<float>(rest << 13) * 0x1p112f;  // the exponents' biases are 112 apart
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

// To nearest, ties to even.
inline uint16_t float_to_half(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f), sign = bits >> 16 & 0x8000u;
  const float x = std::fabs(f);
  if (std::isnan(x)) return 0x7fff;
  if (x >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (x < 0x1p-14f) {  // subnormal: float32 rounds the sum to a multiple of 2^-24
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(x + 0.5f) - std::bit_cast<uint32_t>(0.5f)));
  }
  const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

}  // namespace vptq::cuda::emulation
