// The CPU kernels, one table for each instruction set. The sources in kernels/ are written once over the vector types
// of vec_*.h and compiled once for each instruction set with its own flags.
#pragma once

#include <string>
#include <vector>

#include "backend.h"

namespace vptq::cpu {

// Query heads that share a kv head, of one or more tokens of a sequence: rows that look at the same keys and values.
struct AttentionRows {
  static constexpr int kMost = 32;

  DType type;
  int head_dim;
  std::byte* const* blocks;         // of the sequence
  size_t key_offset, value_offset;  // in each block, of the layer and kv head
  int n;                            // rows
  const float* q[kMost];            // (head_dim)
  int first[kMost], last[kMost];    // the positions that each sees
  float* sums[kMost];               // AttentionSums
};

// What a row's softmax(q K^T / sqrt(head_dim)) V comes from, over some of its positions: floats at these places.
struct AttentionSums {
  static constexpr int kLargest = 0;  // the largest score
  static constexpr int kTotal = 1;    // of the weights e^(score - largest)
  static constexpr int kValues = 16;  // weights V (head_dim); room up to a multiple of kBlockTokens
};

struct Kernels {
  const char* isa;

  // Rows that the kernels below take at a time, of vector length v; fewer cost as much.
  int (*rows_at_a_time)(int v);
  // y[t][o] (+)= sum_j w[o, j] x[t][first_column + j] over the columns of c, for the outputs o in
  // [row_begin, row_end). x (n_tokens, in_features) is in the permuted order and scaled. row_begin is a multiple of v,
  // row_end too or out_features.
  void (*vq)(const VqColumns& c, const float* x, int64_t x_stride, int n_tokens, int row_begin, int row_end,
             bool accumulate, float* y, int64_t y_stride);
  // The same in 16-bit integers: activations and weights as whole numbers times a step (kernels/i16.h).
  bool i16_pays;  // they are faster than float32
  // The step of a group's weights; 0 where 16 bits are not enough for them.
  float (*i16_step)(const VqColumns& c, int group);
  // What round_columns() makes of a token's x, from the first of the columns on: so many words of 32 bits.
  int64_t (*i16_size)(const VqColumns& c);
  void (*round_columns)(const VqColumns& c, const float* x, float* words);
  // w_steps (n_groups), x (n_tokens, x_stride) the words of each token
  void (*vq_i16)(const VqColumns& c, const float* w_steps, const float* x, int64_t x_stride, int n_tokens,
                 int row_begin, int row_end, bool accumulate, float* y, int64_t y_stride);
  // y[t][o] = sum_i W[o, i] x[t][i] for the rows [row_begin, row_end)
  void (*dense)(const Tensor& w, int in_features, const float* x, int64_t x_stride, int n_tokens, int row_begin,
                int row_end, float* y, int64_t y_stride);
  // out[c] = x[perm[c]] * scale[perm[c]]; perm or scale may be nullptr (identity, ones)
  void (*gather)(const float* x, const uint16_t* perm, const float* scale, int n, float* out);
  float (*dot)(const float* x, const float* y, int n);
  float (*sum)(const float* x, int n);
  void (*rms_norm)(const float* x, const float* weight, float eps, int d, float* out);
  // Puts a key and a value (head_dim) of one head into place `slot` of a block's keys and values.
  void (*store_kv)(const float* k, const float* v, DType type, int head_dim, int slot, std::byte* keys,
                   std::byte* values);
  // Attention of the rows over the blocks [first_block, end_block) of their sequence; their sums are overwritten.
  void (*attend)(const AttentionRows& rows, int first_block, int end_block);
  void (*swiglu)(float* gate, const float* up, int64_t n);
  void (*add)(float* x, const float* y, int64_t n);
  // One row of a dense matrix as float.
  void (*row)(const Tensor& table, int64_t row, int n, float* out);
};

// The instruction sets that this build has and this processor can run, best first; the last is "generic".
std::vector<std::string> available_isas();

// The kernels for `isa`; for "" those that the environment variable VPTQ_CPU_ISA names, or else the best.
// Throws OptionError where it is not available.
const Kernels& kernels_for(const std::string& isa);

}  // namespace vptq::cpu
