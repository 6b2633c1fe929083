#include "cpu/linear.h"

#include <numeric>

namespace vptq::cpu {
namespace {

constexpr int kDenseUnit = 4;  // rows that share the loads of x

// The least common multiple of the vector lengths.
int vptq_unit(const VptqWeights& weights) {
  int unit = 1;
  for (const VqColumns& c : weights.columns) unit = std::lcm(unit, c.v);
  return unit;
}

}  // namespace

DenseLinear::DenseLinear(const Kernels& kernels, const LinearWeights& weights, const float* bias)
    : CpuLinear(kernels, weights.in_features, weights.out_features, kDenseUnit, bias),
      weight_(std::get<DenseWeights>(weights.weights).weight) {}

void DenseLinear::rows(const float* x, const float*, int n, int begin, int end, float* y) const {
  kernels_.dense(weight_, in_features, x, in_features, n, begin, end, y, out_features);
  if (!bias_) return;
  for (int t = 0; t < n; ++t) kernels_.add(y + int64_t{t} * out_features + begin, bias_ + begin, end - begin);
}

VptqLinear::VptqLinear(const Kernels& kernels, const LinearWeights& weights, const VptqNorms& norms, const float* bias)
    : CpuLinear(kernels, weights.in_features, weights.out_features, vptq_unit(std::get<VptqWeights>(weights.weights)),
                bias),
      columns_(std::get<VptqWeights>(weights.weights).columns),
      perm_(std::get<VptqWeights>(weights.weights).perm),
      norms_(norms) {}

int VptqLinear::prepared_size() const {
  return (gathers() ? in_features : 0) + (norms_.shift || norms_.out_shift ? 1 : 0);
}

void VptqLinear::prepare(const float* x, int n, int t, float* prepared) const {
  const float* xt = x + int64_t{t} * in_features;
  if (gathers()) kernels_.gather(xt, perm_, norms_.scale, in_features, prepared + int64_t{t} * in_features);
  float* offset = prepared + first_offset(n) + t;
  if (norms_.shift) *offset = kernels_.dot(xt, norms_.shift, in_features);
  if (norms_.out_shift) *offset = kernels_.sum(xt, in_features);
}

void VptqLinear::rows(const float* x, const float* prepared, int n, int begin, int end, float* y) const {
  const float* permuted = gathers() ? prepared : x;
  for (size_t i = 0; i < columns_.size(); ++i)
    kernels_.vq(columns_[i], permuted, in_features, n, begin, end, i > 0, y, out_features);
  finish(prepared + first_offset(n), n, begin, end, y);
}

void VptqLinear::finish(const float* offsets, int n, int begin, int end, float* y) const {
  for (int t = 0; t < n; ++t)
    for (int64_t o = begin; o < end; ++o) {
      float& out = y[int64_t{t} * out_features + o];
      if (norms_.shift) out += offsets[t];
      if (norms_.out_scale) out = out * norms_.out_scale[o] + offsets[t] * norms_.out_shift[o];
      if (bias_) out += bias_[o];
    }
}

}  // namespace vptq::cpu
