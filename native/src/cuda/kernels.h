// The kernels, as the host calls them. They take device memory and a stream, allocate nothing and wait for nothing, so
// that another engine can call them and a graph can record them. Activations are float32, row-major (n_tokens,
// features). What a token gets depends on that token alone: neither on its place in the batch nor on n.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "backend.h"
#include "cuda/runtime.h"
#include "cuda/slices.h"
#include "vptq/model.h"

namespace vptq::cuda {

// What the kernels can do: CudaBackend::check_limits() refuses other models. What these do not bound may be as large as
// model.cpp lets it be: offsets of rows are 64-bit numbers, and grids have their many blocks in the first dimension.
inline constexpr int kMaxHeadDim = 256;  // of attention: a row lies in registers, and a tile of rows in shared memory
inline constexpr int kMaxHeads = 65535;  // of attention: they are a grid's second dimension
// Tokens of a sequence: attention's tiles and parts may end so far behind the last one, and have to be below 2^31.
inline constexpr int kMaxContext = std::numeric_limits<int>::max() - 4095;
// Bytes that a block of threads can have of a multiprocessor's shared memory, from compute capability 8.0 on.
inline constexpr size_t kLeastShared = size_t{99} << 10;

// cudaSuccess if this build has machine code for the current device, or code that its driver has compiled for it.
cudaError_t find_kernels();

// A Batch in device memory. What a kernel launches depends on n, n_prompt and n_outputs only, never on what the arrays
// hold: a graph recorded for one batch runs the next one.
struct DeviceBatch {
  const int32_t* tokens;       // (n)
  const int32_t* positions;    // (n)
  const int32_t* sequences;    // (n) index into first_block
  const int32_t* first_block;  // (n_sequences)
  std::byte* const* blocks;
  const int32_t* outputs;  // (n_outputs) indices of tokens, ascending
  int n, n_prompt, n_outputs;
};

// out = x / sqrt(mean(x^2) + eps) * weight, over rows of d
void rms_norm(const float* x, int n, int d, const float* weight, float eps, float* out, Stream stream);
void rope(const DeviceBatch& batch, int n_head, int head_dim, const float* inv_freq, float* x, Stream stream);
void swiglu(float* gate, const float* up, size_t n, Stream stream);  // gate = silu(gate) * up
void add(float* x, const float* y, size_t n, Stream stream);         // x += y
// out[i] = x[outputs[i]], rows of d
void select(const DeviceBatch& batch, int d, const float* x, float* out, Stream stream);

// Of each row of logits (n, n_vocab), as TopLogits wants them: the largest, in any order, and those of `tokens`
// (n, n_tokens). found (n, n_largest + n_tokens); workspace (n, top_logits_parts(n_vocab), n_largest)
int top_logits_parts(int n_vocab);
void top_logits(const float* logits, int n, int n_vocab, int n_largest, const int32_t* tokens, int n_tokens,
                Candidate* found, Candidate* workspace, Stream stream);

void store_kv(const DeviceBatch& batch, const KvLayout& layout, int layer, const float* k, const float* v,
              Stream stream);
// Into how many parts a token's positions are split, to keep so many multiprocessors busy. It changes the order of the
// sums, so it is to be one number for all uses.
int attention_splits(int n_head_kv, int n_multiprocessors);
// Floats of workspace that attention() needs for n tokens.
size_t attention_workspace(int n, int n_head, int head_dim, int n_splits);
// As Backend::attention. Tokens [0, n_prompt) are parts of prompts: they go through tensor cores, where the cache's
// type and head_dim allow it.
void attention(const DeviceBatch& batch, const KvLayout& layout, int layer, int n_head, int window, int n_splits,
               const float* q, float* out, float* workspace, Stream stream);

// W (out_features, in_features), of a matrix type
struct DenseLayer {
  int in_features, out_features;
  DType type;
  const std::byte* weight;
  const float* bias;  // (out_features) or nullptr
};

// VptqWeights with device pointers; the vectors of norms are float32.
struct VqLayer {
  int in_features, out_features;
  int n_columns;                       // 1 or 2
  VqColumns columns[2];                // the outliers first, if any
  const uint16_t* perm;                // (in_features) or nullptr
  const float *scale, *shift;          // (in_features) or nullptr
  const float *out_scale, *out_shift;  // (out_features) or nullptr
  const float* bias;                   // (out_features) or nullptr
};

// x[t] = W[tokens[t]], (n, in_features)
void embed(const DeviceBatch& batch, const DenseLayer& w, float* x, Stream stream);
void embed(const DeviceBatch& batch, const VqLayer& w, float* x, Stream stream);

// y (n, out_features) = W x + bias in float32, for tokens of any number; fast for up to kFewTokens.
inline constexpr int kFewTokens = 8;
void dense_few(const DenseLayer& w, const float* x, int n, float* y, Stream stream);
// The plain kernel, the reference of the others: indices as in the file, centroids gathered from L2.
// Up to kMaxUses layers on the same x in one launch.
inline constexpr int kMaxUses = 3;
struct VqUse {
  VqLayer layer;
  float* y;
};
void vq_few(const VqUse* uses, int n_uses, const float* x, int n, Stream stream);

// The fast kernel, for layers whose indices are in the order of slices.h: centroids gathered from shared memory.
struct SlicedUse {
  VqLayer layer;
  int n_slices;
  const uint32_t* run_begin;
  const uint32_t* entries;  // aligned to 16 bytes
  float* y;
};
struct DeviceSliceJobs {
  const SliceJob* jobs;  // share_out()'s, of layers in the order of the uses
  int n_blocks, n_centroids, n_columns;
  size_t most_shared;  // bytes that a block of threads can have of the GPU's shared memory
};
size_t sliced_workspace(const SlicedUse* uses, int n_uses, int n);  // floats
void vq_sliced(const SlicedUse* uses, int n_uses, const DeviceSliceJobs& jobs, const float* x, int n, float* workspace,
               Stream stream);

// y = W x + bias for many tokens: f16 tensor-core products with float32 sums. x is rounded to f16 times a power of two
// of each token. Weights and centroids in f16 are exact, those of other types and sums of two centroids are rounded to
// f16, where kMostRounded and more are infinite.
inline constexpr float kMostRounded = 256;
size_t gemm_workspace(int n, int in_features);  // bytes
void dense_many(const DenseLayer& w, const float* x, int n, float* y, void* workspace, Stream stream);
void vq_many(const VqLayer& w, const float* x, int n, float* y, void* workspace, Stream stream);

}  // namespace vptq::cuda
