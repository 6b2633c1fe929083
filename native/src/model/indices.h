// Values packed back to back, least significant bit first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace vptq {

inline uint32_t low_bits(int bits) { return bits == 32 ? ~0u : (1u << bits) - 1; }

// Value j of a row of `row_bytes` bytes that holds values of `bits` (at most 32) bits each.
inline uint32_t packed_value(const std::byte* row, int64_t row_bytes, int64_t j, int bits) {
  const int64_t bit = j * bits, byte = bit / 8;
  uint64_t window = 0;  // 32 bits from any bit of a byte reach into five bytes
  std::memcpy(&window, row + byte, static_cast<size_t>(std::min<int64_t>(8, row_bytes - byte)));
  return static_cast<uint32_t>(window >> (bit % 8)) & low_bits(bits);
}

// Puts `value` into place j of such a row, which has been 0.
inline void pack_value(std::byte* row, int64_t row_bytes, int64_t j, int bits, uint32_t value) {
  const int64_t bit = j * bits, byte = bit / 8;
  const auto n = static_cast<size_t>(std::min<int64_t>(8, row_bytes - byte));
  uint64_t window = 0;
  std::memcpy(&window, row + byte, n);
  window |= uint64_t{value} << (bit % 8);
  std::memcpy(row + byte, &window, n);
}

}  // namespace vptq
