// Hyperparameters and weights by name, their shapes checked against each other once, at load.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "vptq/gguf.h"
#include "vptq/tensor.h"

namespace vptq {

struct Hyperparameters {
  std::string architecture;  // "llama", "qwen2"
  int n_vocab = 0;
  int n_ctx_train = 0;
  int n_embd = 0;
  int n_ff = 0;
  int n_layer = 0;
  int n_head = 0;
  int n_head_kv = 0;
  int head_dim = 0;
  float rms_eps = 0;
  std::vector<float> inv_freq;      // (head_dim / 2), radians a position, rope scaling applied
  std::vector<int> sliding_window;  // (n_layer): a token sees itself and the window - 1 before it; 0: all
};

// W as a dense matrix (out_features, in_features) of one of the matrix types.
struct DenseWeights {
  Tensor weight;
};

inline constexpr int kMaxVectorLength = 64;

// A run of columns (in permuted order) whose weights are vectors of v, along the output dimension, looked up in
// codebooks: the outlier columns, or all the others.
struct VqColumns {
  int first_column = 0;
  int n_groups = 1;         // one codebook a group of columns
  int group_size = 0;       // columns
  int v = 0, k = 0, r = 0;  // vector length, centroids, residual centroids (0: no residual)
  int index_bits = 0, res_bits = 0;
  int n_blocks = 0;  // ceil(out_features / v)
  // Row (group q, block b) at indices + (q * n_blocks + b) * row_bytes: group_size values of index_bits + res_bits
  // bits, least significant first, (res_index << index_bits) | index.
  const std::byte* indices = nullptr;
  int64_t row_bytes = 0;
  DType type = DType::f16;
  const std::byte* centroids = nullptr;  // (n_groups, k, v); the 8 bytes before can be read: kernels load more than v
  const std::byte* res_centroids = nullptr;  // (n_groups, r, v)
};

// W by vector quantisation. docs/file-format.md says which weight this stands for.
struct VptqWeights {
  std::vector<VqColumns> columns;  // the outliers first, if any
  const uint16_t* perm = nullptr;  // (in_features); nullptr: the identity
  const Tensor* scale = nullptr;   // (in_features), with shift
  const Tensor* shift = nullptr;
  const Tensor* out_scale = nullptr;  // (out_features), with out_shift
  const Tensor* out_shift = nullptr;
};

// A linear layer y = W x + bias. A new format of weights is a new kind here and in each backend.
struct LinearWeights {
  std::string name;
  int in_features = 0, out_features = 0;
  const Tensor* bias = nullptr;  // (out_features)
  std::variant<DenseWeights, VptqWeights> weights;
};

using FindTensor = std::function<const Tensor*(const std::string&)>;

// Whether there is a linear layer `name`, of any kind of weights.
bool has_linear(const FindTensor& find, const std::string& name);
// The linear layer `name`, its tensors checked against in_features and out_features; `path` is for messages.
// Throws FileError.
LinearWeights read_linear(const std::string& path, const FindTensor& find, const std::string& name, int in_features,
                          int out_features);

// W (out_features, in_features) in float32, each operation rounded by itself: the slow, obvious twin of all kernels,
// bit-identical to the checkpoint's weight.
void dequantize(const LinearWeights& layer, float* out);

struct LayerWeights {
  Tensor attn_norm, ffn_norm;                         // (n_embd)
  LinearWeights attn_q, attn_k, attn_v, attn_output;  // n_embd -> n_head * head_dim, n_head_kv * head_dim
  LinearWeights ffn_gate, ffn_up, ffn_down;           // n_embd -> n_ff -> n_embd

  std::array<const LinearWeights*, 7> linear_layers() const {
    return {&attn_q, &attn_k, &attn_v, &attn_output, &ffn_gate, &ffn_up, &ffn_down};
  }
};

// Consecutive layers of a model: begin ... end - 1. With the first of all goes the embedding, with the last the output.
struct LayerRange {
  int begin = 0, end = 0;

  int size() const { return end - begin; }
};

class Model {
 public:
  // Throws FileError, UnsupportedError.
  explicit Model(const std::string& path);

  const GgufFile& file() const { return file_; }
  const Hyperparameters& hyperparameters() const { return hyperparameters_; }
  const LinearWeights& token_embd() const { return token_embd_; }  // n_embd -> n_vocab: row t is token t's
  const Tensor& output_norm() const { return output_norm_; }       // (n_embd)
  const LinearWeights& output() const { return output_; }          // n_embd -> n_vocab; the embedding where tied
  bool tied() const { return tied_; }                              // the output's weight is the embedding
  const std::vector<LayerWeights>& layers() const { return layers_; }
  size_t layer_bytes(int layer) const;  // of the layer's tensors
  size_t embedding_bytes() const;       // of the embedding's
  size_t output_bytes() const;          // of the output's and its norm's

  // All linear layers in file order: blk.0.attn_q ... output.
  std::vector<const LinearWeights*> linear_layers() const;

 private:
  size_t bytes_of_tensors(const std::string& prefix) const;

  GgufFile file_;
  Hyperparameters hyperparameters_;
  Tensor output_norm_;
  LinearWeights token_embd_, output_;
  bool tied_ = false;
  std::vector<LayerWeights> layers_;
};

}  // namespace vptq
