// What the kernels of attention have in common.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/kv_cache.cuh"

namespace vptq::cuda {

inline constexpr int kMostSplits = 64;

// One use of attention, of the batch's tokens from first_token on.
struct AttentionUse {
  DeviceBatch batch;
  KvHeads kv;
  int first_token, n_head, window;
  float scale;     // 1 / sqrt(head_dim)
  const float* q;  // (n, n_head, head_dim)
  float* out;      // (n, n_head, head_dim)

  VPTQ_DEVICE int heads_per_kv() const { return n_head / kv.n_head_kv; }
  // The first position that the token at a position sees.
  VPTQ_DEVICE int first_seen(int position) const {
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
};

// Any tokens: each alone, in float32.
void attention_few(const AttentionUse& use, DType type, int n, int n_splits, float* workspace, Stream stream);

// The batch's first n tokens, on tensor cores: see attention_many.cu for what is rounded.
bool attention_many_can(DType type, int head_dim);
void attention_many(const AttentionUse& use, DType type, int n, Stream stream);

}  // namespace vptq::cuda
