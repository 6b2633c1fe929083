// Small linear layers of random weights, of the kinds that a model has: problems for the self-check.
#pragma once

#include <cstddef>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "vptq/model.h"

namespace vptq {

// Tensors of random numbers, as a file would hold them.
class RandomTensors {
 public:
  explicit RandomTensors(std::mt19937_64& random) : random_(random) {}
  RandomTensors(const RandomTensors&) = delete;
  RandomTensors& operator=(const RandomTensors&) = delete;

  // Numbers of the sizes 2^exponent to 2^(exponent + 1), or in quantised types up to that, of either sign.
  const Tensor* make(DType type, std::vector<int64_t> shape, int exponent);
  // Bytes that are 0, to be filled.
  std::byte* allocate(size_t bytes);

 private:
  std::mt19937_64& random_;
  std::deque<std::vector<std::byte>> memory_;
  std::deque<Tensor> tensors_;
};

// All that kernels tell layers apart by, but for their sizes: "v8-k65536-256 F16, permuted, norms per input".
std::string kind_of(const LinearWeights& layer);

class SmallLayer {
 public:
  // Of the kind of `like`, which it does not keep, with so many outputs and about so many columns.
  SmallLayer(const LinearWeights& like, int out_features, int columns, std::mt19937_64& random);

  const LinearWeights& weights() const { return weights_; }

 private:
  void make(const DenseWeights& like, int columns);
  void make(const VptqWeights& like, int columns);
  // word_bytes: a row of indices is whole words of so many.
  VqColumns make(const VqColumns& like, int first_column, int n_groups, int group_size, int word_bytes);
  const Tensor* vector(const Tensor* like, int n, int exponent);

  std::mt19937_64& random_;
  RandomTensors tensors_;
  LinearWeights weights_;
};

}  // namespace vptq
