#include "transformer.h"

namespace vptq {

Transformer::Transformer(const Model& model, Backend& backend, int max_tokens, bool i16)
    : h_(model.hyperparameters()),
      backend_(backend),
      token_embd_(backend.table(model.token_embd())),
      output_norm_(backend.vector(model.output_norm())),
      inv_freq_(backend.vector(h_.inv_freq)),
      output_(backend.linear(model.output(), false)) {
  for (int i = 0; i < h_.n_layer; ++i) {
    const LayerWeights& w = model.layers()[i];
    layers_.push_back({
        .attn_norm = backend.vector(w.attn_norm),
        .ffn_norm = backend.vector(w.ffn_norm),
        .attn_q = backend.linear(w.attn_q, i16),
        .attn_k = backend.linear(w.attn_k, i16),
        .attn_v = backend.linear(w.attn_v, i16),
        .attn_output = backend.linear(w.attn_output, i16),
        .ffn_gate = backend.linear(w.ffn_gate, i16),
        .ffn_up = backend.linear(w.ffn_up, i16),
        .ffn_down = backend.linear(w.ffn_down, i16),
        .sliding_window = h_.sliding_window[i],
    });
  }
  const auto activations = [&](size_t features) {
    return reinterpret_cast<float*>(backend.allocate(max_tokens * features * sizeof(float), "the activations"));
  };
  const size_t q_dim = size_t(h_.n_head) * h_.head_dim, kv_dim = size_t(h_.n_head_kv) * h_.head_dim;
  x_ = activations(h_.n_embd);
  h1_ = activations(h_.n_embd);
  q_ = activations(q_dim);
  k_ = activations(kv_dim);
  v_ = activations(kv_dim);
  attn_ = activations(q_dim);
  gate_ = activations(h_.n_ff);
  up_ = activations(h_.n_ff);
}

void Transformer::forward(Batch& batch, const KvLayout& layout, float* logits) {
  Backend& b = backend_;
  b.embed(batch, token_embd_, x_);
  for (int i = 0; i < h_.n_layer; ++i) {
    const Layer& layer = layers_[i];
    int n = batch.n();
    b.rms_norm(x_, n, h_.n_embd, layer.attn_norm, h_.rms_eps, h1_);
    b.apply({{*layer.attn_q, q_}, {*layer.attn_k, k_}, {*layer.attn_v, v_}}, h1_, n, batch.n_prompt);
    b.rope(batch, h_.n_head, h_.head_dim, inv_freq_, q_);
    b.rope(batch, h_.n_head_kv, h_.head_dim, inv_freq_, k_);
    b.store_kv(batch, layout, i, k_, v_);
    if (i + 1 == h_.n_layer) {  // the other tokens' keys and values were all that was wanted of them
      b.select_outputs(batch, h_.n_embd, x_);
      b.select_outputs(batch, h_.n_head * h_.head_dim, q_);
      batch.keep_outputs();
      n = batch.n();
      if (n == 0) return;
    }
    b.attention(batch, layout, i, h_.n_head, layer.sliding_window, q_, attn_);
    b.apply({{*layer.attn_output, h1_}}, attn_, n, batch.n_prompt);
    b.add(x_, h1_, size_t(n) * h_.n_embd);

    b.rms_norm(x_, n, h_.n_embd, layer.ffn_norm, h_.rms_eps, h1_);
    b.apply({{*layer.ffn_gate, gate_}, {*layer.ffn_up, up_}}, h1_, n, batch.n_prompt);
    b.swiglu(gate_, up_, size_t(n) * h_.n_ff);
    b.apply({{*layer.ffn_down, h1_}}, gate_, n, batch.n_prompt);
    b.add(x_, h1_, size_t(n) * h_.n_embd);
  }
  b.rms_norm(x_, batch.n(), h_.n_embd, output_norm_, h_.rms_eps, h1_);
  b.apply({{*output_, logits}}, h1_, batch.n(), 0);
}

}  // namespace vptq
