// What kernels use of the processor, each under one name. The emulation that the tests run kernels in has its own twin
// of this file (tests/native/cuda_emulation/cuda/device.cuh): what is not here, a kernel cannot use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define VPTQ_DEVICE __device__ __forceinline__

namespace vptq::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory, aligned to 128 bytes.
VPTQ_DEVICE std::byte* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<std::byte*>(memory);
}

VPTQ_DEVICE void sync_block() { __syncthreads(); }
VPTQ_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
VPTQ_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
VPTQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

// Whether any of these bits is set, which has to be the same in all lanes. So the compiler knows that they branch
// together, and leaves out what would bring them together again.
VPTQ_DEVICE bool all_alike(uint32_t bits) { return __any_sync(kAllLanes, static_cast<int>(bits)); }

// Adds to what lies in the block's shared memory, while others may, too; what lay there before.
VPTQ_DEVICE uint32_t add_shared(uint32_t* sum, uint32_t value) { return atomicAdd(sum, value); }

// 16-bit floats are uint16_t in memory, two of them a uint32_t, the first in the low half.
VPTQ_DEVICE float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
VPTQ_DEVICE float bf16_to_float(uint16_t h) { return __uint_as_float(uint32_t{h} << 16); }
VPTQ_DEVICE uint16_t float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }  // to nearest even
VPTQ_DEVICE float2 halves_to_floats(uint32_t h) { return __half22float2(*reinterpret_cast<const __half2*>(&h)); }
VPTQ_DEVICE uint32_t floats_to_halves(float low, float high) {  // to nearest even
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
VPTQ_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
VPTQ_DEVICE uint32_t bits_of(float f) { return __float_as_uint(f); }
VPTQ_DEVICE uint32_t add_halves(uint32_t a, uint32_t b) {
  const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// Four of the eight bytes of b:a, counted from a's lowest: the one that each hexadecimal digit of `digits` names.
VPTQ_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t digits) { return __byte_perm(a, b, digits); }

// A pointer that was itself loaded: the compiler cannot know that it points into global memory.
template <class T>
VPTQ_DEVICE T* to_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// Loads of what is read once: past L1, first to be evicted.
VPTQ_DEVICE uint4 load_once(const uint4* p) { return __ldcs(p); }
VPTQ_DEVICE uint2 load_once(const uint2* p) { return __ldcs(p); }
VPTQ_DEVICE uint32_t load_once(const uint32_t* p) { return __ldcs(p); }
VPTQ_DEVICE uint16_t load_once(const uint16_t* p) { return __ldcs(p); }
// Brings a line into L2.
VPTQ_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Results that are not normal numbers become 0: else each exponential takes twice as many instructions.
VPTQ_DEVICE float exp_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// d (16, 8) += a (16, 16) b (16, 8) in f16 with float32 sums, over a warp; fragments as PTX's mma.m16n8k16 has them.
VPTQ_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of f16: lane l gives the address of row l % 8 of matrix l / 8; PTX's ldmatrix.x4.
VPTQ_DEVICE void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
VPTQ_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const uint16_t* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory, in the background: both aligned to 16.
VPTQ_DEVICE void copy_async(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
VPTQ_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last N groups of copies are there; sync_block() shows them to the others.
template <int N>
VPTQ_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace vptq::cuda
