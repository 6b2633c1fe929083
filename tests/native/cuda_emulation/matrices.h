// What a warp does together with matrices of f16.
#pragma once

#include <cstdint>

namespace vptq::cuda::emulation {

void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void load_matrices(uint32_t (&r)[4], const uint16_t* row);
void load_matrices_transposed(uint32_t (&r)[4], const uint16_t* row);

}  // namespace vptq::cuda::emulation
