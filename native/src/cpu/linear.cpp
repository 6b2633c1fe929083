#include "cpu/linear.h"

#include <algorithm>
#include <numeric>

#include "model/indices.h"

namespace vptq::cpu {
namespace {

constexpr int kDenseUnit = 4;  // rows that share the loads of x

// Whole vectors of all columns, and all that the kernels take at a time of the last ones, which are most.
int vptq_unit(const Kernels& kernels, const VptqWeights& weights) {
  int unit = kernels.rows_at_a_time(weights.columns.back().v);
  for (const VqColumns& c : weights.columns) unit = std::lcm(unit, c.v);
  return unit;
}

}  // namespace

DenseLinear::DenseLinear(const Kernels& kernels, const LinearWeights& layer, const DenseWeights& weights,
                         const float* bias)
    : CpuLinear(kernels, layer.in_features, layer.out_features, kDenseUnit, bias), weight_(weights.weight) {}

void DenseLinear::rows(const Activations& x, const float*, int begin, int end, float* y) const {
  kernels_.dense(weight_, in_features, x.x, in_features, x.n, begin, end, y, out_features);
  if (!bias_) return;
  for (int t = 0; t < x.n; ++t) kernels_.add(y + int64_t{t} * out_features + begin, bias_ + begin, end - begin);
}

VptqLinear::VptqLinear(const Kernels& kernels, const LinearWeights& layer, const VptqWeights& weights,
                       const VptqNorms& norms, const float* bias, bool rounded)
    : CpuLinear(kernels, layer.in_features, layer.out_features, vptq_unit(kernels, weights), bias),
      columns_(weights.columns),
      perm_(weights.perm),
      norms_(norms) {
  if (!rounded) return;
  for (const VqColumns& c : columns_) {
    words_ += kernels.i16_size(c);
    std::vector<float>& steps = w_steps_.emplace_back();
    for (int group = 0; group < c.n_groups; ++group) steps.push_back(kernels.i16_step(c, group));
    if (std::count(steps.begin(), steps.end(), 0.0f)) {
      words_ = 0;
      return;
    }
  }
}

int64_t VptqLinear::prepared_size(const Activations& x) const { return first_word(x.n) + n_i16(x) * words_; }

void VptqLinear::prepare(const Activations& x, int t, float* prepared) const {
  const float* xt = x.x + int64_t{t} * in_features;
  float* permuted = prepared + int64_t{t} * in_features;
  if (gathers()) kernels_.gather(xt, perm_, norms_.scale, in_features, permuted);
  float* offset = prepared + first_offset(x.n) + t;
  if (norms_.shift) *offset = kernels_.dot(xt, norms_.shift, in_features);
  if (norms_.out_shift) *offset = kernels_.sum(xt, in_features);
  if (t >= n_i16(x)) return;
  float* words = prepared + first_word(x.n) + t * words_;
  for (const VqColumns& c : columns_) {
    kernels_.round_columns(c, (gathers() ? permuted : xt) + c.first_column, words);
    words += kernels_.i16_size(c);
  }
}

void VptqLinear::rows(const Activations& x, const float* prepared, int begin, int end, float* y) const {
  const int rounded = n_i16(x);
  const float* rest = (gathers() ? prepared : x.x) + int64_t{rounded} * in_features;
  const float* words = prepared + first_word(x.n);
  for (size_t i = 0; i < columns_.size(); ++i) {
    const VqColumns& c = columns_[i];
    if (rounded) kernels_.vq_i16(c, w_steps_[i].data(), words, words_, rounded, begin, end, i > 0, y, out_features);
    if (rounded < x.n)
      kernels_.vq(c, rest, in_features, x.n - rounded, begin, end, i > 0, y + int64_t{rounded} * out_features,
                  out_features);
    words += kernels_.i16_size(c);
  }
  finish(prepared + first_offset(x.n), x.n, begin, end, y);
}

// Few rows are ever asked for at a time, so this is plain C++ for all instruction sets.
void VptqLinear::row(int o, float* out) const {
  for (const VqColumns& c : columns_) {
    const size_t element = bytes_of(c.type, 1), lane = o % c.v;
    for (int q = 0; q < c.n_groups; ++q) {
      const std::byte* indices = c.indices + (int64_t{q} * c.n_blocks + o / c.v) * c.row_bytes;
      for (int j = 0; j < c.group_size; ++j) {
        const uint32_t value = packed_value(indices, c.row_bytes, j, c.index_bits + c.res_bits);
        const auto number = [&](const std::byte* codebook, int size, uint32_t index) {
          float w;
          to_float(c.type, codebook + ((size_t(q) * size + index) * c.v + lane) * element, 1, &w);
          return w;
        };
        float w = number(c.centroids, c.k, value & low_bits(c.index_bits));
        if (c.r) w += number(c.res_centroids, c.r, value >> c.index_bits);
        const int column = c.first_column + q * c.group_size + j, i = perm_ ? perm_[column] : column;
        if (norms_.scale) w = w * norms_.scale[i] + norms_.shift[i];
        if (norms_.out_scale) w = w * norms_.out_scale[o] + norms_.out_shift[o];
        out[i] = w;
      }
    }
  }
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
