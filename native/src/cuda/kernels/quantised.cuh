// Numbers of the quantised types, as vptq/tensor.h has them.
#pragma once

#include "cuda/device.cuh"
#include "vptq/tensor.h"

namespace vptq::cuda {

// Four int8s times their scale, which came from an f16: exact. Conversions of integers are for the few units that
// exponentials go through. But a byte q + 128 in the middle of the mantissa of 2^15 is the float 2^15 + 128 + q: a byte
// move, and as the products with both terms fit 24 bits, one fused step.
VPTQ_DEVICE void q8_to_floats(uint32_t bytes, float scale, float* x) {
  const uint32_t biased = bytes ^ 0x80808080u;
  const float bias = scale * -32896.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    x[i] = fmaf(float_from_bits(pick_bytes(biased, 0x47000000u, 0x7404 + (i << 4))), scale, bias);
}

// Q4_0 to Q5_1: what layout_of says, as numbers, for device code may not call it; and where in a block the fifth bits
// are, and the lower four.
template <DType Type>
inline constexpr bool kHasMin = layout_of(Type).has_min;
template <DType Type>
inline constexpr int kBits = layout_of(Type).bits;
template <DType Type>
inline constexpr int kBlock = layout_of(Type).block;
template <DType Type>
inline constexpr int kBlockBytes = layout_of(Type).block_bytes;
template <DType Type>
inline constexpr int kFifth = kHasMin<Type> ? 4 : 2;
template <DType Type>
inline constexpr int kLower = kFifth<Type> + (kBits<Type> == 5 ? 4 : 0);

// The weight that q stands for, in a block that begins with these halves: q d + m.
template <DType Type>
VPTQ_DEVICE float packed_weight(const uint16_t* halves, uint32_t q) {
  const float d = half_to_float(halves[0]);
  return fmaf(d, float(q), kHasMin<Type> ? half_to_float(halves[1]) : d * -float(1 << (kBits<Type> - 1)));
}

// The same of a row's column.
template <DType Type>
VPTQ_DEVICE float packed_weight(const std::byte* row, int column) {
  const std::byte* block = row + int64_t{column} / kBlock<Type> * kBlockBytes<Type>;
  const int i = column % kBlock<Type>;
  uint32_t q = uint32_t(block[kLower<Type> + i % 16]) >> (i < 16 ? 0 : 4) & 15;
  if (kBits<Type> == 5) q |= (uint32_t(block[kFifth<Type> + i / 8]) >> i % 8 & 1) << 4;
  return packed_weight<Type>(reinterpret_cast<const uint16_t*>(block), q);
}

}  // namespace vptq::cuda
