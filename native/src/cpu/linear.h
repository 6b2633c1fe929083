// Linear layers on the CPU. A layer works in two steps, so that each can be shared out to threads: what it makes of a
// token's x, then some of its rows for all tokens.
#pragma once

#include <memory>
#include <vector>

#include "backend.h"
#include "cpu/kernels.h"

namespace vptq::cpu {

struct Activations {
  const float* x;  // (n, in_features)
  int n;
  int n_prompt;  // the first so many tokens are parts of prompts
};

class CpuLinear : public Linear {
 public:
  CpuLinear(const Kernels& kernels, int in_features, int out_features, int row_unit, const float* bias)
      : in_features(in_features), out_features(out_features), row_unit(row_unit), kernels_(kernels), bias_(bias) {}

  const int in_features, out_features;
  const int row_unit;  // rows() begins at a multiple of it, and ends at one or at out_features

  // Floats that prepare() needs; 0: there is nothing to prepare.
  virtual int64_t prepared_size(const Activations& x) const = 0;
  // Makes ready token t; prepared (prepared_size()).
  virtual void prepare(const Activations& x, int t, float* prepared) const = 0;
  // y[t][o] = sum_i W[o, i] x[t][i] + bias[o] for all tokens and the outputs o in [begin, end)
  virtual void rows(const Activations& x, const float* prepared, int begin, int end, float* y) const = 0;
  // out[i] = W[o, i], (in_features); and what that costs, in multiply-adds
  virtual void row(int o, float* out) const = 0;
  virtual int64_t row_work() const = 0;

 protected:
  const Kernels& kernels_;
  const float* bias_;  // (out_features) or nullptr
};

class DenseLinear : public CpuLinear {
 public:
  DenseLinear(const Kernels& kernels, const LinearWeights& layer, const DenseWeights& weights, const float* bias);

  int64_t prepared_size(const Activations&) const override { return 0; }
  void prepare(const Activations&, int, float*) const override {}
  void rows(const Activations& x, const float* prepared, int begin, int end, float* y) const override;
  void row(int o, float* out) const override { kernels_.row(weight_, o, in_features, out); }
  int64_t row_work() const override { return in_features; }

 private:
  Tensor weight_;
};

// Scales and shifts as float32; nullptr where there is none.
struct VptqNorms {
  const float *scale, *shift;          // (in_features)
  const float *out_scale, *out_shift;  // (out_features)
};

// W x = sum_c w[:, c] (x scale)[perm[c]] + sum_i x_i shift_i, and with norms per output out_scale (w x) + out_shift
// sum_i x_i.
class VptqLinear : public CpuLinear {
 public:
  VptqLinear(const Kernels& kernels, const LinearWeights& layer, const VptqWeights& weights, const VptqNorms& norms,
             const float* bias, bool rounded);

  int64_t prepared_size(const Activations& x) const override;
  void prepare(const Activations& x, int t, float* prepared) const override;
  void rows(const Activations& x, const float* prepared, int begin, int end, float* y) const override;
  void row(int o, float* out) const override;
  int64_t row_work() const override { return 16 * int64_t{in_features}; }

 private:
  bool gathers() const { return perm_ || norms_.scale; }
  // What is prepared: x permuted and scaled (n, in_features) if the layer gathers; from first_offset(n) on what the
  // shifts add to every output of a token (n); from first_word(n) on the first tokens' x in 16 bits (n_i16, words_).
  int64_t first_offset(int n) const { return gathers() ? int64_t{n} * in_features : 0; }
  int64_t first_word(int n) const { return first_offset(n) + (norms_.shift || norms_.out_shift ? n : 0); }
  int n_i16(const Activations& x) const { return words_ ? x.n_prompt : 0; }
  void finish(const float* offsets, int n, int begin, int end, float* y) const;

  std::vector<VqColumns> columns_;
  std::vector<std::vector<float>> w_steps_;  // of each columns' codebooks, for 16 bits
  int64_t words_ = 0;                        // of a token's x in 16 bits; 0: not wanted, or not for these weights
  const uint16_t* perm_;
  VptqNorms norms_;
};

}  // namespace vptq::cpu
