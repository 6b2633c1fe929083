// The emulation's twin of native/src/cuda/device.cuh.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"
#include "half.h"
#include "matrices.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // one block runs at a time

#define VPTQ_DEVICE inline

inline uint3& threadIdx = vptq::cuda::emulation::thread_index;
inline uint3& blockIdx = vptq::cuda::emulation::block_index;
inline dim3& blockDim = vptq::cuda::emulation::block_shape;
inline dim3& gridDim = vptq::cuda::emulation::grid_shape;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace vptq::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

VPTQ_DEVICE std::byte* dynamic_shared() { return emulation::dynamic_shared(); }

VPTQ_DEVICE void sync_block() { emulation::sync_block(); }
VPTQ_DEVICE void sync_warp() { emulation::sync_warp(); }

template <class T>
VPTQ_DEVICE T shuffle(T value, int lane) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  const std::byte* all = emulation::exchange("shuffle", &value, sizeof(T));
  std::memcpy(&value, all + (static_cast<unsigned>(lane) % kWarp) * emulation::kDepositBytes, sizeof(T));
  return value;
}
template <class T>
VPTQ_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, emulation::lane() ^ mask);
}

VPTQ_DEVICE bool all_alike(uint32_t bits) { return bits != 0; }

VPTQ_DEVICE uint32_t add_shared(uint32_t* sum, uint32_t value) {
  return __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);  // so that ThreadSanitizer knows
}

VPTQ_DEVICE float half_to_float(uint16_t h) { return emulation::half_to_float(h); }
VPTQ_DEVICE float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t{h} << 16); }
VPTQ_DEVICE uint16_t float_to_half(float f) { return emulation::float_to_half(f); }
VPTQ_DEVICE float2 halves_to_floats(uint32_t h) {
  return {half_to_float(static_cast<uint16_t>(h)), half_to_float(static_cast<uint16_t>(h >> 16))};
}
VPTQ_DEVICE uint32_t floats_to_halves(float low, float high) {
  return float_to_half(low) | uint32_t{float_to_half(high)} << 16;
}
VPTQ_DEVICE float float_from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
VPTQ_DEVICE uint32_t bits_of(float f) { return std::bit_cast<uint32_t>(f); }
VPTQ_DEVICE uint32_t add_halves(uint32_t a, uint32_t b) {
  const float2 x = halves_to_floats(a), y = halves_to_floats(b);
  return float_to_half(x.x + y.x) | uint32_t{float_to_half(x.y + y.y)} << 16;
}

VPTQ_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t digits) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(bytes >> (digits >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return picked;
}

template <class T>
VPTQ_DEVICE T* to_global(T* p) {
  return p;
}
VPTQ_DEVICE uint4 load_once(const uint4* p) { return *p; }
VPTQ_DEVICE uint2 load_once(const uint2* p) { return *p; }
VPTQ_DEVICE uint32_t load_once(const uint32_t* p) { return *p; }
VPTQ_DEVICE uint16_t load_once(const uint16_t* p) { return *p; }
VPTQ_DEVICE void prefetch(const void* p) { *static_cast<const volatile std::byte*>(p); }

VPTQ_DEVICE float exp_fast(float x) { return std::exp(x); }

VPTQ_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulation::mma_f16(d, a, b); }
VPTQ_DEVICE void load_matrices(uint32_t (&r)[4], const uint16_t* row) { emulation::load_matrices(r, row); }
VPTQ_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const uint16_t* row) {
  emulation::load_matrices_transposed(r, row);
}

VPTQ_DEVICE void copy_async(void* shared, const void* global) { emulation::copy_async(shared, global); }
VPTQ_DEVICE void commit_copies() { emulation::commit_copies(); }
template <int N>
VPTQ_DEVICE void wait_copies() {
  emulation::wait_copies(N);
}

}  // namespace vptq::cuda
