#include <algorithm>
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/kernels/attention.cuh"

namespace vptq::cuda {

namespace {

// Tokens whose partial sums lie in the workspace at a time.
constexpr int kTokensAtOnce = 16;

}  // namespace

int attention_splits(int n_head_kv, int n_multiprocessors) {
  return std::clamp(2 * n_multiprocessors / n_head_kv, 1, kMostSplits);
}

size_t attention_workspace(int n, int n_head, int head_dim, int n_splits) {
  return size_t(std::min(n, kTokensAtOnce)) * n_head * n_splits * (head_dim + 2);
}

void attention(const DeviceBatch& batch, const KvLayout& layout, int layer, int n_head, int window, int n_splits,
               const float* q, float* out, float* workspace, Stream stream) {
  const float scale = 1.0f / std::sqrt(float(layout.head_dim));
  AttentionUse use{batch, KvHeads(layout, layer), 0, n_head, window, scale, q, out};
  if (batch.n_prompt > 0 && attention_many_can(layout.type, layout.head_dim)) {
    attention_many(use, layout.type, batch.n_prompt, stream);
    use.first_token = batch.n_prompt;
  }
  for (; use.first_token < batch.n; use.first_token += kTokensAtOnce)
    attention_few(use, layout.type, std::min(batch.n - use.first_token, kTokensAtOnce), n_splits, workspace, stream);
}

}  // namespace vptq::cuda
