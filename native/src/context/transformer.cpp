#include "context/transformer.h"

#include <functional>
#include <utility>

namespace vptq {
namespace {

size_t q_dim(const Hyperparameters& p) { return size_t(p.n_head) * p.head_dim; }
size_t kv_dim(const Hyperparameters& p) { return size_t(p.n_head_kv) * p.head_dim; }

}  // namespace

Transformer::Transformer(const Model& model, LayerRange layers, Backend& backend, bool rounded,
                         const std::function<void(int, int)>& progress)
    : p_(model.hyperparameters()),
      range_(layers),
      backend_(backend),
      token_embd_(first() ? backend.table(model.token_embd()) : nullptr),
      output_norm_(last() ? backend.vector(model.output_norm()) : nullptr),
      output_(last() ? backend.linear(model.output(), false) : nullptr),
      inv_freq_(backend.vector(p_.inv_freq)) {
  for (int i = range_.begin; i < range_.end; ++i) {
    const LayerWeights& w = model.layers()[i];
    layers_.push_back({
        .attn_norm = backend.vector(w.attn_norm),
        .ffn_norm = backend.vector(w.ffn_norm),
        .attn_q = backend.linear(w.attn_q, rounded),
        .attn_k = backend.linear(w.attn_k, rounded),
        .attn_v = backend.linear(w.attn_v, rounded),
        .attn_output = backend.linear(w.attn_output, rounded),
        .ffn_gate = backend.linear(w.ffn_gate, rounded),
        .ffn_up = backend.linear(w.ffn_up, rounded),
        .ffn_down = backend.linear(w.ffn_down, rounded),
        .sliding_window = p_.sliding_window[i],
    });
    if (progress) progress(i + 1, p_.n_layer);
  }
  const auto activations = [&](size_t features) {
    return reinterpret_cast<float*>(
        backend.allocate(backend.max_tokens() * features * sizeof(float), "the activations"));
  };
  x_ = activations(p_.n_embd);
  kept_ = activations(p_.n_embd);
  h_ = activations(p_.n_embd);
  q_ = activations(q_dim(p_));
  k_ = activations(kv_dim(p_));
  v_ = activations(kv_dim(p_));
  attn_ = activations(q_dim(p_));
  gate_ = activations(p_.n_ff);
  up_ = activations(p_.n_ff);
}

size_t Transformer::activation_bytes(const Hyperparameters& p, int max_tokens) {
  return (3 * p.n_embd + 2 * (q_dim(p) + kv_dim(p) + p.n_ff)) * max_tokens * sizeof(float);
}

void Transformer::forward(const Batch& batch, const KvLayout& layout, LayerRange layers, std::span<float> x,
                          std::span<float> logits, TopLogits* top) {
  const bool whole = layers.size() == range_.size(), ends = layers.end == range_.end;
  float* stream = whole ? x_ : kept_;
  auto* bytes = reinterpret_cast<std::byte*>(stream);
  outputs_.take_outputs_of(batch);
  const auto operations = [&](float* out) { run(batch, layout, layers, stream, out); };
  if (layers.begin == range_.begin && !first()) backend_.write(bytes, x.data(), x.size_bytes());
  if (ends && last()) {
    backend_.forward(batch, outputs_, logits, top, whole, std::ref(operations));
  } else {
    backend_.forward(batch, outputs_, {}, nullptr, whole, std::ref(operations));
    if (ends) backend_.read(bytes, x.data(), x.size_bytes());
  }
}

void Transformer::run(const Batch& all, const KvLayout& layout, LayerRange layers, float* x, float* logits) {
  Backend& b = backend_;
  float *h = h_, *q = q_, *attn = attn_;
  if (layers.begin == 0) b.embed(all, *token_embd_, x);
  for (int i = layers.begin; i < layers.end; ++i) {
    const int own = i - range_.begin;
    const Layer& layer = layers_[own];
    b.rms_norm(x, all.n(), p_.n_embd, layer.attn_norm, p_.rms_eps, h);
    b.apply({{*layer.attn_q, q}, {*layer.attn_k, k_}, {*layer.attn_v, v_}}, h, all.n(), all.n_prompt);
    b.rope(all, p_.n_head, p_.head_dim, inv_freq_, q);
    b.rope(all, p_.n_head_kv, p_.head_dim, inv_freq_, k_);
    b.store_kv(all, layout, own, k_, v_);

    const Batch& batch = i + 1 < p_.n_layer ? all : outputs_;
    const int n = batch.n();
    if (n == 0) return;
    if (n < all.n() && i + 1 == p_.n_layer) {  // the other tokens' keys and values were all that was wanted of them
      b.select_outputs(all, p_.n_embd, x, h);
      b.select_outputs(all, p_.n_head * p_.head_dim, q, attn);
      std::swap(x, h);
      std::swap(q, attn);
    }
    b.attention(batch, layout, own, p_.n_head, layer.sliding_window, q, attn);
    b.apply({{*layer.attn_output, h}}, attn, n, batch.n_prompt);
    b.add(x, h, size_t(n) * p_.n_embd);

    b.rms_norm(x, n, p_.n_embd, layer.ffn_norm, p_.rms_eps, h);
    b.apply({{*layer.ffn_gate, gate_}, {*layer.ffn_up, up_}}, h, n, batch.n_prompt);
    b.swiglu(gate_, up_, size_t(n) * p_.n_ff);
    b.apply({{*layer.ffn_down, h}}, gate_, n, batch.n_prompt);
    b.add(x, h, size_t(n) * p_.n_embd);
  }
  if (layers.end < p_.n_layer) return;
  const int n = outputs_.n();
  b.rms_norm(x, n, p_.n_embd, output_norm_, p_.rms_eps, h);
  b.apply({{*output_, logits}}, h, n, 0);
}

}  // namespace vptq
