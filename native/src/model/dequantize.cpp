// The weight that a linear layer stands for, term by term as docs/file-format.md writes it. Built without fused
// multiply-add, so that every operation is rounded by itself.
#include <cstring>

#include "model/indices.h"
#include "overloaded.h"
#include "vptq/model.h"

namespace vptq {
namespace {

std::vector<float> floats(const Tensor* t) {
  if (!t) return {};
  std::vector<float> out(t->bytes / bytes_of(t->type, 1));
  to_float(t->type, t->data, out.size(), out.data());
  return out;
}

void dequantize_q8_0(const Tensor& t, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    const std::byte* block = t.data + i / kQ8Block * kQ8BlockBytes;
    uint16_t d;
    std::memcpy(&d, block, 2);
    out[i] = half_to_float(d) * float(int8_t(block[2 + i % kQ8Block]));
  }
}

void dequantize_columns(const VqColumns& c, const LinearWeights& layer, const uint16_t* perm, float* out) {
  const size_t element = bytes_of(c.type, 1);
  const int bits = c.index_bits + c.res_bits;
  for (int q = 0; q < c.n_groups; ++q)
    for (int b = 0; b < c.n_blocks; ++b)
      for (int j = 0; j < c.group_size; ++j) {
        const uint32_t value =
            packed_value(c.indices + (int64_t{q} * c.n_blocks + b) * c.row_bytes, c.row_bytes, j, bits);
        const size_t index = size_t(q) * c.k + (value & low_bits(c.index_bits));
        const int column = c.first_column + q * c.group_size + j;
        const int i = perm ? perm[column] : column;
        for (int lane = 0; lane < c.v && b * c.v + lane < layer.out_features; ++lane) {
          float w;
          to_float(c.type, c.centroids + (index * c.v + lane) * element, 1, &w);
          if (c.r) {
            const size_t res_index = size_t(q) * c.r + (value >> c.index_bits);
            float residual;
            to_float(c.type, c.res_centroids + (res_index * c.v + lane) * element, 1, &residual);
            w += residual;
          }
          out[(int64_t{b} * c.v + lane) * layer.in_features + i] = w;
        }
      }
}

void dequantize_dense(const DenseWeights& w, const LinearWeights& layer, float* out) {
  const Tensor& t = w.weight;
  const size_t n = size_t(layer.in_features) * layer.out_features;
  t.type == DType::q8_0 ? dequantize_q8_0(t, n, out) : to_float(t.type, t.data, n, out);
}

void dequantize_vptq(const VptqWeights& w, const LinearWeights& layer, float* out) {
  for (const VqColumns& c : w.columns) dequantize_columns(c, layer, w.perm, out);
  const auto scale = floats(w.scale), shift = floats(w.shift);
  const auto out_scale = floats(w.out_scale), out_shift = floats(w.out_shift);
  for (int64_t o = 0; o < layer.out_features; ++o)
    for (int64_t i = 0; i < layer.in_features; ++i) {
      float& weight = out[o * layer.in_features + i];
      if (w.scale) weight = weight * scale[i] + shift[i];
      if (w.out_scale) weight = weight * out_scale[o] + out_shift[o];
    }
}

}  // namespace

void dequantize(const LinearWeights& layer, float* out) {
  std::visit(Overloaded{[&](const DenseWeights& w) { dequantize_dense(w, layer, out); },
                        [&](const VptqWeights& w) { dequantize_vptq(w, layer, out); }},
             layer.weights);
}

}  // namespace vptq
