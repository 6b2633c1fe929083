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

float half_at(const std::byte* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return half_to_float(bits);
}

// Weight i of a quantised block, as vptq/tensor.h has it.
float block_weight(DType type, const std::byte* block, int i) {
  const float d = half_at(block);
  if (type == DType::q8_0) return d * float(int8_t(block[2 + i]));
  const TypeLayout layout = layout_of(type);
  const bool five = layout.bits == 5;
  const std::byte* fifth = block + (layout.has_min ? 4 : 2);
  const std::byte* lower = fifth + (five ? 4 : 0);
  int q = i < 16 ? int(lower[i]) & 15 : int(lower[i - 16]) >> 4;
  if (five) q |= (int(fifth[i / 8]) >> i % 8 & 1) << 4;
  return layout.has_min ? d * float(q) + half_at(block + 2) : d * float(q - (five ? 16 : 8));
}

void dequantize_blocks(const Tensor& t, size_t n, float* out) {
  const TypeLayout layout = layout_of(t.type);
  for (size_t i = 0; i < n; ++i)
    out[i] = block_weight(t.type, t.data + i / layout.block * layout.block_bytes, int(i % layout.block));
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
  is_float(t.type) ? to_float(t.type, t.data, n, out) : dequantize_blocks(t, n, out);
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
