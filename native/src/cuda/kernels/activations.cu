// x made ready for gemm.cuh: f16, permuted and scaled as the columns of the weights want it.
#include "cuda/kernels/gemm.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 256;

int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// A block's largest value and its sum; every thread gets both.
VPTQ_DEVICE void reduce(uint32_t& largest, float& sum) {
  __shared__ uint32_t largests[kThreads / kWarp];
  __shared__ float sums[kThreads / kWarp];
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(largest, mask);
    largest = largest > other ? largest : other;
    sum += shuffle_xor(sum, mask);
  }
  if (threadIdx.x % kWarp == 0) {
    largests[threadIdx.x / kWarp] = largest;
    sums[threadIdx.x / kWarp] = sum;
  }
  sync_block();
  sum = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) {
    largest = largest > largests[i] ? largest : largests[i];
    sum += sums[i];
  }
}

// A block makes a token. The power of two brings its largest value to [2^9, 2^10): far from f16's largest, and what is
// 2^23 times smaller is still a normal number. A token with a value that is not finite becomes NaN.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(VqLayer layer, int n_outliers, const float* __restrict__ x, HalfActivations out) {
  const float* xt = x + int64_t{blockIdx.x} * layer.in_features;
  const auto value = [&](int c) {
    const int i = layer.perm ? layer.perm[c] : c;
    return layer.scale ? xt[i] * layer.scale[i] : xt[i];
  };
  uint32_t largest = 0;  // as bits, whose order is that of absolute values, infinity and then NaN at the end
  float offset = 0;
  for (int c = threadIdx.x; c < layer.in_features; c += kThreads) {
    const uint32_t bits = bits_of(value(c)) & 0x7fffffffu;
    largest = largest > bits ? largest : bits;
    if (has_offset(layer)) offset = add_to_offset(layer, c, xt[c], offset);
  }
  reduce(largest, offset);

  const uint32_t exponent = largest >> 23;  // with a bias of 127; so have the factor's, and its inverse's
  uint32_t factor_exponent = 127 + 9 + 127 - exponent;
  if (factor_exponent > 253) factor_exponent = 253;  // 2^126, whose inverse is a normal number, too
  float factor = float_from_bits(factor_exponent << 23), inverse = float_from_bits((254 - factor_exponent) << 23);
  if (largest == 0) factor = inverse = 1;
  if (exponent == 255) factor = inverse = float_from_bits(0x7fc00000u);
  if (threadIdx.x == 0) {
    out.inverse[blockIdx.x] = inverse;
    out.offset[blockIdx.x] = offset;
  }
  uint16_t* row = out.x + int64_t{blockIdx.x} * out.stride;
  for (int p = threadIdx.x; p < out.stride; p += kThreads) {
    const int c = p < out.main_column ? p : p - out.main_column + n_outliers;
    const bool is_column = c < (p < out.main_column ? n_outliers : layer.in_features);
    row[p] = is_column ? float_to_half(value(c) * factor) : 0;
  }
}

}  // namespace

size_t gemm_workspace(int n, int in_features) {
  const size_t stride =
      round_up(in_features, kStepColumns) + kStepColumns;  // the outliers and the others each end a step
  return round_up(n, kMostTokens) * (stride * sizeof(uint16_t) + 2 * sizeof(float));
}

HalfActivations prepare_activations(const VqLayer& layer, const float* x, int n, void* workspace, Stream stream) {
  const int n_outliers = layer.n_columns == 2 ? layer.columns[1].first_column : 0;
  HalfActivations out;
  out.n = n;
  out.main_column = round_up(n_outliers, kStepColumns);
  out.stride = out.main_column + round_up(layer.in_features - n_outliers, kStepColumns);
  out.x = static_cast<uint16_t*>(workspace);
  out.inverse = reinterpret_cast<float*>(out.x + size_t(round_up(n, kMostTokens)) * out.stride);
  out.offset = out.inverse + n;
  launch(prepare_kernel, {dim3(n), dim3(kThreads)}, stream, layer, n_outliers, x, out);
  return out;
}

}  // namespace vptq::cuda
