// The operations that the forward pass is written over. A backend implements them on its device and nothing else.
//
// Activations are float32, row-major (n_tokens, features), in the backend's memory. Each token's result depends on that
// token alone, not on the others of its batch: a sequence gives the same numbers alone and in company.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "vptq/candidate.h"
#include "vptq/model.h"

namespace vptq {

// Keys and values of kBlockTokens tokens, all layers: (n_layer, 2, n_head_kv), keys first, of (kBlockTokens, head_dim)
// elements in the order that suits the backend. Q8_0: an f16 scale for each kQ8Block elements of a token.
struct KvLayout {
  static constexpr int kBlockTokens = 32;

  int n_layer, n_head_kv, head_dim;
  DType type;  // F16, F32, or, where kQ8Block divides head_dim, Q8_0

  size_t head_bytes() const { return bytes_of(type, size_t(kBlockTokens) * head_dim); }
  size_t layer_bytes() const { return 2 * n_head_kv * head_bytes(); }
  size_t block_bytes() const { return n_layer * layer_bytes(); }
  static int64_t blocks_for(int64_t n_tokens) { return n_tokens / kBlockTokens + (n_tokens % kBlockTokens != 0); }
};

// New tokens of one or more sequences, fed together. Sequence s has the blocks
// blocks[first_block[s]] ... in the order of its positions.
struct Batch {
  std::vector<int32_t> tokens;       // (n)
  std::vector<int32_t> positions;    // (n)
  std::vector<int32_t> sequences;    // (n) index into first_block
  std::vector<int32_t> first_block;  // (n_sequences)
  std::vector<std::byte*> blocks;
  std::vector<int32_t> outputs;  // the tokens, by index, ascending, whose logits are wanted
  int n_prompt = 0;              // the first so many tokens are parts of prompts, and may be rounded

  int n() const { return static_cast<int>(tokens.size()); }

  // Becomes those tokens of another batch whose logits are wanted.
  void take_outputs_of(const Batch& all) {
    const auto resize = [n = all.outputs.size()](auto&... vectors) { (vectors.resize(n), ...); };
    resize(tokens, positions, sequences, outputs);
    n_prompt = 0;
    for (size_t i = 0; i < all.outputs.size(); ++i) {
      const int32_t t = all.outputs[i];
      n_prompt += t < all.n_prompt;
      tokens[i] = all.tokens[t];
      positions[i] = all.positions[t];
      sequences[i] = all.sequences[t];
      outputs[i] = static_cast<int32_t>(i);
    }
    first_block = all.first_block;
    blocks = all.blocks;
  }
};

// What sampling wants of the logits (n_outputs, n_vocab), and what a backend has found.
struct TopLogits {
  int n_vocab;
  int n_largest;                 // of each row: so many, from 1 to n_vocab; of equal ones those of the lower tokens,
                                 // and before all others any that are not finite
  int n_tokens;                  // of each row, besides
  std::vector<int32_t> tokens;   // (n_outputs, n_tokens), from 0 to n_vocab - 1
  std::vector<Candidate> found;  // (n_outputs, n_largest + n_tokens): the largest in any order, then the others

  int row_size() const { return n_largest + n_tokens; }
};

// A linear layer made ready by a backend.
class Linear {
 public:
  virtual ~Linear() = default;
};

// One use of a linear layer: y (n, out_features) = W x + bias
struct Projection {
  const Linear& layer;
  float* y;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string description() const = 0;  // "cpu (avx512, 2 threads)"
  virtual size_t available_memory() const = 0;  // bytes that could still be allocated
  virtual int max_tokens() const = 0;           // of a batch
  virtual bool rounding_pays() const = 0;       // linear layers are faster in 16-bit numbers than in float32

  // Throws UnsupportedError, or OptionError for n_ctx, where the operations cannot do what this model wants of them.
  virtual void check_limits(const Model&, int /* n_ctx */) const {}

  // Of a device with memory of its own, for those who measure it: its bytes, free or not, and the rate of large copies
  // within it, bytes read and written a second.
  virtual size_t total_memory() const { return 0; }
  virtual double copy_bandwidth() { return 0; }

  // Memory that lives as long as the backend, aligned to 64 bytes; `what` is for the message of OutOfMemoryError.
  virtual std::byte* allocate(size_t bytes, const std::string& what) = 0;
  // Between the backend's memory and the host's; what was asked for before is done.
  virtual void write(std::byte* to, const void* host, size_t bytes) = 0;
  virtual void read(const std::byte* from, void* host, size_t bytes) = 0;

  // Bytes that a layer can take beside its weights, at most, to be faster; and how many all layers together may take.
  virtual size_t extra_memory(const LinearWeights&) const { return 0; }
  virtual void allow_extra_memory(size_t) {}

  // Weights made ready for the operations below. The model outlives the backend: a backend may use them in place.
  // rounded: to be applied to prompts in 16-bit numbers, where these weights allow it.
  virtual std::unique_ptr<Linear> linear(const LinearWeights& weights, bool rounded) = 0;
  virtual std::unique_ptr<Linear> table(const LinearWeights& weights) = 0;  // without a bias, for embed alone
  virtual const float* vector(const Tensor& weights) = 0;                   // as float32
  virtual const float* vector(const std::vector<float>& values) = 0;

  // Runs a step: operations(out) asks for the operations below, on `batch` and at the end on `outputs`, the tokens of
  // it whose logits are wanted, and for these at `out`; they end up in logits (n_outputs, n_vocab), or only what `top`
  // wants of them in it, where it is given. whole: the same is asked for of all batches of these sizes, so that a
  // backend may keep it and do it again without asking; else it is a piece of a step.
  virtual void forward(const Batch& batch, const Batch& outputs, std::span<float> logits, TopLogits* top, bool whole,
                       const std::function<void(float*)>& operations) = 0;
  // The most that TopLogits::n_largest can be; 0: it is not to be asked for, all logits are at hand.
  virtual int max_top_logits() const { return 0; }

  // x[t] = W[tokens[t]], the rows of a table()'s weight
  virtual void embed(const Batch& batch, const Linear& table, float* x) = 0;
  // out = x / sqrt(mean(x^2) + eps) * weight, over rows of d
  virtual void rms_norm(const float* x, int n, int d, const float* weight, float eps, float* out) = 0;
  // All of these layers on the same x (n, in_features), whose first n_prompt tokens are parts of prompts.
  virtual void apply(std::initializer_list<Projection> projections, const float* x, int n, int n_prompt) = 0;
  // Rotates x (n, n_head, head_dim): the pair (i, i + head_dim / 2) by the angle position * inv_freq[i].
  virtual void rope(const Batch& batch, int n_head, int head_dim, const float* inv_freq, float* x) = 0;
  // Puts k and v (n, n_head_kv, head_dim) into the cache at the tokens' positions.
  virtual void store_kv(const Batch& batch, const KvLayout& layout, int layer, const float* k, const float* v) = 0;
  // out = softmax(q K^T / sqrt(head_dim)) V over the positions that each token sees: all up to its own, or with a
  // window > 0 only the last `window` of them. q, out (n, n_head, head_dim).
  virtual void attention(const Batch& batch, const KvLayout& layout, int layer, int n_head, int window, const float* q,
                         float* out) = 0;
  // gate = silu(gate) * up
  virtual void swiglu(float* gate, const float* up, size_t n) = 0;
  // x += y
  virtual void add(float* x, const float* y, size_t n) = 0;
  // out[i] = x[batch.outputs[i]], rows of d
  virtual void select_outputs(const Batch& batch, int d, const float* x, float* out) = 0;
};

std::unique_ptr<Backend> make_cpu_backend(int n_threads);  // 0: the physical cores
// Both throw UnsupportedError, which says why, where there is no GPU, driver or library for it.
int cuda_device_count();
std::unique_ptr<Backend> make_cuda_backend(int device);  // from 0 to cuda_device_count() - 1

}  // namespace vptq
