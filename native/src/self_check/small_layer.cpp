#include "self_check/small_layer.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "model/indices.h"
#include "overloaded.h"

namespace vptq {
namespace {

constexpr int kMostGroups = 3, kMostOutliers = 5;
constexpr size_t kAround = 64;  // bytes before and behind an array, as in a file; and what it is aligned to

std::string kind_of_columns(const VqColumns& c) {
  std::string out = "v";
  out += std::to_string(c.v) + "-k" + std::to_string(c.k) + "-" + std::to_string(c.r) + " " + type_name(c.type);
  return out + (c.n_groups > 1 ? " in groups" : "");
}

std::string kind_of_vptq(const VptqWeights& w) {
  std::string out = kind_of_columns(w.columns.back());
  if (w.columns.size() > 1) out += ", outliers " + kind_of_columns(w.columns.front());
  if (w.perm) out += ", permuted";
  if (w.scale) out += ", norms per input";
  if (w.out_scale) out += ", norms per output";
  return out;
}

// Signs and mantissas at random, one exponent: quick, finite, and nothing that f16 cannot hold.
void fix_exponents(DType type, int exponent, std::byte* data, size_t bytes) {
  if (const TypeLayout layout = layout_of(type); layout.bits) {
    const int size = exponent + 1;  // whole numbers up to 2^(bits - 1), or an m of that size below them
    const auto scale = static_cast<uint16_t>((size - (layout.bits - 1) + 15) << 10);
    const auto min = static_cast<uint16_t>(0x8000 | (size + 15) << 10);
    for (size_t at = 0; at < bytes; at += layout.block_bytes) {
      std::memcpy(data + at, &scale, sizeof(scale));
      if (layout.has_min) std::memcpy(data + at + sizeof(scale), &min, sizeof(min));
    }
    return;
  }
  const int mantissa = type == DType::f32 ? 23 : type == DType::f16 ? 10 : 7, bias = type == DType::f16 ? 15 : 127;
  const size_t element = bytes_of(type, 1);
  const uint32_t kept = low_bits(mantissa) | 1u << (8 * element - 1);
  for (size_t at = 0; at < bytes; at += element) {
    uint32_t number = 0;
    std::memcpy(&number, data + at, element);
    number = (number & kept) | uint32_t(exponent + bias) << mantissa;
    std::memcpy(data + at, &number, element);
  }
}

}  // namespace

const Tensor* RandomTensors::make(DType type, std::vector<int64_t> shape, int exponent) {
  size_t n = 1;
  for (const int64_t d : shape) n *= d;
  const size_t bytes = bytes_of(type, n);
  std::byte* data = allocate(bytes);
  for (size_t at = 0; at < bytes; at += 8) {
    const uint64_t bits = random_();
    std::memcpy(data + at, &bits, std::min<size_t>(8, bytes - at));
  }
  fix_exponents(type, exponent, data, bytes);
  return &tensors_.emplace_back(Tensor{"a problem", type, std::move(shape), data, bytes});
}

std::byte* RandomTensors::allocate(size_t bytes) {
  std::vector<std::byte>& memory = memory_.emplace_back(bytes + 3 * kAround);
  const auto start = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kAround - start % kAround) + kAround;
}

std::string kind_of(const LinearWeights& layer) {
  return std::visit(Overloaded{[](const DenseWeights& w) { return type_name(w.weight.type); },
                               [](const VptqWeights& w) { return kind_of_vptq(w); }},
                    layer.weights) +
         (layer.bias ? ", bias" : "");
}

SmallLayer::SmallLayer(const LinearWeights& like, int out_features, int columns, std::mt19937_64& random)
    : random_(random), tensors_(random), weights_{like.name, 0, out_features, nullptr, {}} {
  std::visit(
      Overloaded{[&](const DenseWeights& w) { make(w, columns); }, [&](const VptqWeights& w) { make(w, columns); }},
      like.weights);
  weights_.bias = vector(like.bias, out_features, 0);
}

void SmallLayer::make(const DenseWeights& like, int columns) {
  weights_.in_features = columns;
  weights_.weights = DenseWeights{*tensors_.make(like.weight.type, {weights_.out_features, columns}, -3)};
}

void SmallLayer::make(const VptqWeights& like, int columns) {
  VptqWeights w;
  int n_outliers = 0;
  if (like.columns.size() > 1) {
    n_outliers = std::min(like.columns.front().group_size, kMostOutliers);
    w.columns.push_back(make(like.columns.front(), 0, 1, n_outliers, sizeof(uint16_t)));
  }
  const int n_groups = std::min(like.columns.back().n_groups, kMostGroups);
  const int group_size = std::max(1, (columns - n_outliers) / n_groups);
  w.columns.push_back(make(like.columns.back(), n_outliers, n_groups, group_size, sizeof(uint32_t)));

  const int n_in = weights_.in_features = n_outliers + n_groups * group_size;
  if (like.perm) {
    auto* perm = reinterpret_cast<uint16_t*>(tensors_.allocate(n_in * sizeof(uint16_t)));
    std::iota(perm, perm + n_in, uint16_t{0});
    std::shuffle(perm, perm + n_in, random_);
    w.perm = perm;
  }
  w.scale = vector(like.scale, n_in, -1);
  w.shift = vector(like.shift, n_in, -3);
  w.out_scale = vector(like.out_scale, weights_.out_features, -1);
  w.out_shift = vector(like.out_shift, weights_.out_features, -3);
  weights_.weights = std::move(w);
}

VqColumns SmallLayer::make(const VqColumns& like, int first_column, int n_groups, int group_size, int word_bytes) {
  VqColumns c = like;
  c.first_column = first_column;
  c.n_groups = n_groups;
  c.group_size = group_size;
  c.n_blocks = (weights_.out_features + c.v - 1) / c.v;
  const int bits = c.index_bits + c.res_bits, word_bits = 8 * word_bytes;
  c.row_bytes = (int64_t{group_size} * bits + word_bits - 1) / word_bits * word_bytes;
  c.centroids = tensors_.make(c.type, {n_groups, c.k, c.v}, -1)->data;
  if (c.r) c.res_centroids = tensors_.make(c.type, {n_groups, c.r, c.v}, -3)->data;

  const int64_t n_rows = int64_t{n_groups} * c.n_blocks;
  std::byte* indices = tensors_.allocate(n_rows * c.row_bytes);
  for (int64_t row = 0; row < n_rows; ++row)
    for (int j = 0; j < group_size; ++j) {
      uint32_t value = random_() % c.k;
      if (c.r) value |= uint32_t(random_() % c.r) << c.index_bits;
      pack_value(indices + row * c.row_bytes, c.row_bytes, j, bits, value);
    }
  c.indices = indices;
  return c;
}

const Tensor* SmallLayer::vector(const Tensor* like, int n, int exponent) {
  return like ? tensors_.make(like->type, {n}, exponent) : nullptr;
}

}  // namespace vptq
