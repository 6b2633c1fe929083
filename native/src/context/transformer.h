// The forward pass of Llama-like models, over the operations of backend.h.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend.h"

namespace vptq {

// Some of a model's layers on one backend. Where others have the layers before or after, the residual stream goes
// from one to the next through the host's memory.
class Transformer {
 public:
  // rounded: prompts go through the layers in 16-bit numbers. progress: as ContextOptions has it, or empty.
  Transformer(const Model& model, LayerRange layers, Backend& backend, bool rounded,
              const std::function<void(int, int)>& progress);

  // Takes a batch of at most backend.max_tokens() tokens through these of the layers(), and stores its keys and values
  // into the cache, which has layers() only. x (n, n_embd), in the host's memory: the residual stream, taken from there
  // before the first of layers(), unless first(), left there after the last one, unless last(). Then it puts the logits
  // of batch.outputs into logits (n_outputs, n_vocab), or what `top` wants of them there.
  // One batch at a time may go through layers() in pieces, the others as a whole in between.
  void forward(const Batch& batch, const KvLayout& layout, LayerRange layers, std::span<float> x,
               std::span<float> logits, TopLogits* top);

  // What a Transformer allocates of a backend for batches of so many tokens.
  static size_t activation_bytes(const Hyperparameters& p, int max_tokens);

  LayerRange layers() const { return range_; }
  bool first() const { return range_.begin == 0; }        // they begin with the embedding
  bool last() const { return range_.end == p_.n_layer; }  // they end with the output

 private:
  struct Layer {
    const float *attn_norm, *ffn_norm;  // (n_embd)
    std::unique_ptr<Linear> attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down;
    int sliding_window;
  };

  // The formula of the model; x (the residual stream) and logits in the backend's memory.
  void run(const Batch& all, const KvLayout& layout, LayerRange layers, float* x, float* logits);

  const Hyperparameters& p_;
  LayerRange range_;
  Backend& backend_;
  std::unique_ptr<Linear> token_embd_;  // (n_vocab, n_embd), if first()
  const float* output_norm_;            // (n_embd), if last(), and so is output_
  std::unique_ptr<Linear> output_;
  const float* inv_freq_;  // (head_dim / 2)
  std::vector<Layer> layers_;
  Batch outputs_;  // of the batch at hand

  float* x_;     // (max_tokens, n_embd)               the residual stream of a batch that goes through all layers
  float* kept_;  // (max_tokens, n_embd)               that of one that stops in between: all else is used by others
  float* h_;     // (max_tokens, n_embd)               normalised, or a layer's result
  float* q_;     // (max_tokens, n_head, head_dim)
  float* k_;     // (max_tokens, n_head_kv, head_dim)
  float* v_;     // (max_tokens, n_head_kv, head_dim)
  float* attn_;  // (max_tokens, n_head, head_dim)
  float* gate_;  // (max_tokens, n_ff)
  float* up_;    // (max_tokens, n_ff)
};

}  // namespace vptq
