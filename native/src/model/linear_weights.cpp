// Reading and checking one linear layer: every shape, and every index that a kernel will follow.
#include <bit>
#include <cstring>
#include <type_traits>

#include "model/indices.h"
#include "vptq/error.h"
#include "vptq/model.h"

namespace vptq {
namespace {

int bits_for(int64_t count) { return std::bit_width(static_cast<uint64_t>(count - 1)); }  // ceil(log2(count))

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A value all of whose exponent bits are set is infinite or not a number.
bool all_finite(const Tensor& t) {
  uint32_t found = 0;  // no early exit: the loop becomes vector code
  if (t.type == DType::f32) {
    const auto* p = reinterpret_cast<const uint32_t*>(t.data);
    for (size_t i = 0; i < t.bytes / 4; ++i) found |= (p[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    const uint16_t exponent = t.type == DType::f16 ? 0x7c00 : 0x7f80;
    const auto* p = reinterpret_cast<const uint16_t*>(t.data);
    for (size_t i = 0; i < t.bytes / 2; ++i) found |= (p[i] & exponent) == exponent;
  }
  return found == 0;
}

// The tensor that all layers of a kind have, and no others, by what stands behind the layer's name.
const char* tensor_of(std::type_identity<DenseWeights>) { return ".weight"; }
const char* tensor_of(std::type_identity<VptqWeights>) { return ".vptq_indices"; }

// use(std::type_identity<Weights>()) for each kind of weights.
template <class Use, class... Weights>
void for_each(std::type_identity<std::variant<Weights...>>, const Use& use) {
  (use(std::type_identity<Weights>()), ...);
}
template <class Use>
void for_each_kind(const Use& use) {
  for_each(std::type_identity<decltype(LinearWeights::weights)>(), use);
}

class LinearReader {
 public:
  LinearReader(const std::string& path, const FindTensor& find, const std::string& name, int in, int out)
      : path_(path), find_(find), name_(name), in_(in), out_(out) {}

  LinearWeights read() {
    LinearWeights layer{name_, in_, out_, vector("bias", out_), {}};
    std::string found, expected;
    for_each_kind([&](auto kind) {
      const std::string suffix = tensor_of(kind);
      expected += (expected.empty() ? "" : " nor ") + suffix;
      const Tensor* tensor = find_(name_ + suffix);
      if (!tensor) return;
      if (!found.empty()) fail(name_, "has both " + found + " and " + suffix + ", expected one of them");
      found = suffix;
      layer.weights = read_weights(kind, *tensor);
    });
    if (found.empty()) fail(name_, "has neither " + expected);
    return layer;
  }

 private:
  [[noreturn]] void fail(const std::string& name, const std::string& what) const {
    throw FileError(path_ + ": tensor '" + name + "': " + what);
  }

  const Tensor& need(const std::string& suffix) const {
    const Tensor* t = find_(name_ + "." + suffix);
    if (!t) fail(name_ + "." + suffix, "missing");
    return *t;
  }

  void expect_shape(const Tensor& t, const std::vector<int64_t>& shape) const {
    if (t.shape != shape) fail(t.name, "shape " + shape_text(t.shape) + ", expected " + shape_text(shape));
  }

  void expect_type(const Tensor& t, DType type) const {
    if (t.type != type) fail(t.name, "type " + type_name(t.type) + ", expected " + type_name(type));
  }

  void expect_float(const Tensor& t) const {
    if (!is_float(t.type)) fail(t.name, "type " + type_name(t.type) + ", expected F16, BF16 or F32");
    if (!all_finite(t)) fail(t.name, "holds NaN or infinity, expected finite numbers");
  }

  // An optional vector of n numbers.
  const Tensor* vector(const std::string& suffix, int64_t n) const {
    const Tensor* t = find_(name_ + "." + suffix);
    if (!t) return nullptr;
    expect_shape(*t, {n});
    expect_float(*t);
    return t;
  }

  DenseWeights read_weights(std::type_identity<DenseWeights>, const Tensor& weight) const {
    expect_shape(weight, {out_, in_});
    if (!is_matrix_type(weight.type))
      fail(weight.name, "type " + type_name(weight.type) + ", expected " + kMatrixTypes);
    return {weight};
  }

  VptqWeights read_weights(std::type_identity<VptqWeights>, const Tensor& indices) const {
    VptqWeights w;
    int n_outliers = 0;
    if (find_(name_ + ".vptq_outlier_indices")) {
      w.columns.push_back(read_outliers());
      n_outliers = w.columns.back().group_size;
    }
    w.columns.push_back(read_main(indices, n_outliers));
    w.perm = read_perm();
    w.scale = vector("vptq_scale", in_);
    w.shift = vector("vptq_shift", in_);
    w.out_scale = vector("vptq_out_scale", out_);
    w.out_shift = vector("vptq_out_shift", out_);
    if (!w.scale != !w.shift || !w.out_scale != !w.out_shift || (w.scale && w.out_scale))
      fail(name_, "expected .vptq_scale with .vptq_shift, or .vptq_out_scale with .vptq_out_shift, or none of them");
    return w;
  }

  // centroids (..., count, v)
  void expect_codebook(const Tensor& t, size_t n_dims) const {
    if (t.shape.size() != n_dims)
      fail(t.name, "shape " + shape_text(t.shape) + ", expected " + std::to_string(n_dims) + " dimensions");
    const int64_t count = t.shape[n_dims - 2], v = t.shape[n_dims - 1];
    if (v > kMaxVectorLength || count > 65536)
      fail(t.name, "shape " + shape_text(t.shape) + ", expected at most 65536 centroids of at most " +
                       std::to_string(kMaxVectorLength) + " weights");
    expect_float(t);
  }

  VqColumns read_outliers() const {
    const Tensor& indices = need("vptq_outlier_indices");
    const Tensor& centroids = need("vptq_outlier_centroids");
    expect_type(indices, DType::i16);
    expect_codebook(centroids, 2);
    VqColumns c;
    c.k = static_cast<int>(centroids.shape[0]);
    c.v = static_cast<int>(centroids.shape[1]);
    c.n_blocks = static_cast<int>(ceil_div(out_, c.v));
    if (indices.shape.size() != 2 || indices.shape[1] >= in_)
      fail(indices.name, "shape " + shape_text(indices.shape) + ", expected (" + std::to_string(c.n_blocks) +
                             ", fewer than " + std::to_string(in_) + ")");
    c.group_size = static_cast<int>(indices.shape[1]);
    expect_shape(indices, {c.n_blocks, c.group_size});
    c.index_bits = 16;
    c.row_bytes = 2 * int64_t{c.group_size};
    c.indices = indices.data;
    c.type = centroids.type;
    c.centroids = centroids.data;
    check_indices(c, indices.name);
    return c;
  }

  VqColumns read_main(const Tensor& indices, int n_outliers) const {
    const Tensor& centroids = need("vptq_centroids");
    expect_type(indices, DType::i32);
    expect_codebook(centroids, 3);
    VqColumns c;
    c.first_column = n_outliers;
    c.k = static_cast<int>(centroids.shape[1]);
    c.v = static_cast<int>(centroids.shape[2]);
    c.type = centroids.type;
    c.centroids = centroids.data;
    c.index_bits = bits_for(c.k);
    if (const Tensor* res = find_(name_ + ".vptq_res_centroids")) {
      expect_codebook(*res, 3);
      c.r = static_cast<int>(res->shape[1]);
      expect_shape(*res, {centroids.shape[0], c.r, c.v});
      expect_type(*res, centroids.type);
      c.res_bits = bits_for(c.r);
      c.res_centroids = res->data;
    }
    const int bits = c.index_bits + c.res_bits;
    if (bits < 1) fail(centroids.name, "shape " + shape_text(centroids.shape) + ", expected at least two centroids");
    if (centroids.shape[0] > in_ - n_outliers || (in_ - n_outliers) % centroids.shape[0] != 0)
      fail(centroids.name, std::to_string(centroids.shape[0]) + " codebooks, expected a divisor of the " +
                               std::to_string(in_ - n_outliers) + " columns that are not outliers");
    c.n_groups = static_cast<int>(centroids.shape[0]);
    c.group_size = (in_ - n_outliers) / c.n_groups;
    c.n_blocks = static_cast<int>(ceil_div(out_, c.v));
    const int64_t words = ceil_div(int64_t{c.group_size} * bits, 32);
    expect_shape(indices, {c.n_groups, c.n_blocks, words});
    c.row_bytes = 4 * words;
    c.indices = indices.data;
    check_indices(c, indices.name);
    return c;
  }

  // Packed indices can name no centroid past the codebook where k and r fill their bits; else each is looked at.
  void check_indices(const VqColumns& c, const std::string& tensor) const {
    if (c.k == 1 << c.index_bits && (c.r == 0 || c.r == 1 << c.res_bits)) return;
    for (int64_t row = 0; row < int64_t{c.n_groups} * c.n_blocks; ++row)
      for (int64_t j = 0; j < c.group_size; ++j) {
        const uint32_t value = packed_value(c.indices + row * c.row_bytes, c.row_bytes, j, c.index_bits + c.res_bits);
        const int64_t index = value & low_bits(c.index_bits), res_index = int64_t{value} >> c.index_bits;
        const bool main_fits = index < c.k;
        if (main_fits && (c.r == 0 || res_index < c.r)) continue;
        fail(tensor, (main_fits ? "residual index " + std::to_string(res_index) : "index " + std::to_string(index)) +
                         " in row " + std::to_string(row) + ", column " + std::to_string(j) + ", expected less than " +
                         std::to_string(main_fits ? c.r : c.k));
      }
  }

  const uint16_t* read_perm() const {
    const Tensor* t = find_(name_ + ".vptq_perm");
    if (!t) return nullptr;
    expect_type(*t, DType::i16);
    expect_shape(*t, {in_});
    const auto* perm = reinterpret_cast<const uint16_t*>(t->data);
    std::vector<bool> seen(in_);
    for (int c = 0; c < in_; ++c) {
      if (perm[c] >= in_)
        fail(t->name, "entry " + std::to_string(perm[c]) + ", expected less than " + std::to_string(in_));
      if (seen[perm[c]]) fail(t->name, "not a permutation: " + std::to_string(perm[c]) + " stands twice");
      seen[perm[c]] = true;
    }
    return perm;
  }

  const std::string& path_;
  const FindTensor& find_;
  const std::string name_;
  const int in_, out_;
};

}  // namespace

bool has_linear(const FindTensor& find, const std::string& name) {
  bool found = false;
  for_each_kind([&](auto kind) { found |= find(name + tensor_of(kind)) != nullptr; });
  return found;
}

LinearWeights read_linear(const std::string& path, const FindTensor& find, const std::string& name, int in_features,
                          int out_features) {
  return LinearReader(path, find, name, in_features, out_features).read();
}

}  // namespace vptq
