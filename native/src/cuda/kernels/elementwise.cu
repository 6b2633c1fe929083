#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 4;  // elements of a thread: 16 bytes

VPTQ_DEVICE float silu_times(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// x[i] = Operation(x[i], y[i]) over n elements; the last few that fill no float4 one by one
template <float Operation(float, float)>
__global__ void __launch_bounds__(kThreads) elementwise_kernel(float* x, const float* y, size_t n) {
  const size_t i = (size_t{blockIdx.x} * kThreads + threadIdx.x) * kAtOnce;
  if (i + kAtOnce <= n) {
    const float4 a = *reinterpret_cast<const float4*>(x + i), b = *reinterpret_cast<const float4*>(y + i);
    *reinterpret_cast<float4*>(x + i) =
        make_float4(Operation(a.x, b.x), Operation(a.y, b.y), Operation(a.z, b.z), Operation(a.w, b.w));
  } else {
    for (size_t j = i; j < n; ++j) x[j] = Operation(x[j], y[j]);
  }
}

VPTQ_DEVICE float sum(float x, float y) { return x + y; }

template <float Operation(float, float)>
void elementwise(float* x, const float* y, size_t n, Stream stream) {
  if (n == 0) return;
  constexpr size_t kElements = kThreads * kAtOnce;
  const Shape shape{dim3(unsigned((n + kElements - 1) / kElements)), dim3(kThreads)};
  launch(elementwise_kernel<Operation>, shape, stream, x, y, n);
}

__global__ void __launch_bounds__(kThreads) select_kernel(const int32_t* outputs, int d, const float* x, float* out) {
  const int i = int(blockIdx.x) * kThreads + threadIdx.x;
  if (i < d) out[int64_t{blockIdx.y} * d + i] = x[int64_t{outputs[blockIdx.y]} * d + i];
}

}  // namespace

cudaError_t find_kernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(select_kernel));
}

void swiglu(float* gate, const float* up, size_t n, Stream stream) { elementwise<silu_times>(gate, up, n, stream); }

void add(float* x, const float* y, size_t n, Stream stream) { elementwise<sum>(x, y, n, stream); }

void select(const DeviceBatch& batch, int d, const float* x, float* out, Stream stream) {
  if (batch.n_outputs == 0) return;
  const Shape shape{dim3((d + kThreads - 1) / kThreads, batch.n_outputs), dim3(kThreads)};
  launch(select_kernel, shape, stream, batch.outputs, d, x, out);
}

}  // namespace vptq::cuda
