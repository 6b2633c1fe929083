#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 512;

// The sum over a block's threads, the same for each of them and in the same order every time.
VPTQ_DEVICE float sum_over_block(float value, float (&of_warps)[kThreads / kWarp]) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  sync_block();
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += of_warps[warp];
  return sum;
}

VPTQ_DEVICE float sum_of_squares(float x) { return x * x; }
VPTQ_DEVICE float sum_of_squares(float4 x) { return (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w); }
VPTQ_DEVICE float scaled(float x, float scale, float weight) { return x * scale * weight; }
VPTQ_DEVICE float4 scaled(float4 x, float scale, float4 weight) {
  return make_float4(scaled(x.x, scale, weight.x), scaled(x.y, scale, weight.y), scaled(x.z, scale, weight.z),
                     scaled(x.w, scale, weight.w));
}

// A block a row of d elements, as n_parts floats or float4s. The second look at x is served by L1.
template <class Part>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const Part* __restrict__ x, int n_parts, int d, const Part* __restrict__ weight, float eps,
                    Part* __restrict__ out) {
  __shared__ float of_warps[kThreads / kWarp];
  const Part* row = x + int64_t{blockIdx.x} * n_parts;
  float sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < n_parts; i += kThreads) sum += sum_of_squares(row[i]);
  const float scale = 1.0f / sqrtf(sum_over_block(sum, of_warps) / float(d) + eps);
#pragma unroll 4
  for (int i = threadIdx.x; i < n_parts; i += kThreads)
    out[int64_t{blockIdx.x} * n_parts + i] = scaled(row[i], scale, weight[i]);
}

}  // namespace

void rms_norm(const float* x, int n, int d, const float* weight, float eps, float* out, Stream stream) {
  if (n == 0) return;
  const Shape shape{dim3(n), dim3(kThreads)};
  if (d % 4 == 0)
    launch(rms_norm_kernel<float4>, shape, stream, reinterpret_cast<const float4*>(x), d / 4, d,
           reinterpret_cast<const float4*>(weight), eps, reinterpret_cast<float4*>(out));
  else
    launch(rms_norm_kernel<float>, shape, stream, x, d, d, weight, eps, out);
}

}  // namespace vptq::cuda
