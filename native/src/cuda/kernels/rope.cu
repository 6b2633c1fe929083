#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 128;

// A thread a pair (i, i + half) of a token and a head. Angles are as large as positions: the sine is the accurate one.
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const int32_t* positions, int n_head, int half, const float* inv_freq, float* x) {
  const int t = blockIdx.y, p = int(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= n_head * half) return;
  const int head = p / half, i = p % half;
  const float angle = float(positions[t]) * inv_freq[i];
  const float c = cosf(angle), s = sinf(angle);
  float* pair = x + (int64_t{t} * n_head + head) * 2 * half + i;
  const float a = pair[0], b = pair[half];
  pair[0] = a * c - b * s;
  pair[half] = b * c + a * s;
}

}  // namespace

void rope(const DeviceBatch& batch, int n_head, int head_dim, const float* inv_freq, float* x, Stream stream) {
  const int half = head_dim / 2;
  if (batch.n == 0 || half == 0) return;
  const Shape shape{dim3((n_head * half + kThreads - 1) / kThreads, batch.n), dim3(kThreads)};
  launch(rope_kernel, shape, stream, batch.positions, n_head, half, inv_freq, x);
}

}  // namespace vptq::cuda
