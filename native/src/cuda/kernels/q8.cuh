// Numbers of Q8_0.
#pragma once

#include "cuda/device.cuh"

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

}  // namespace vptq::cuda
