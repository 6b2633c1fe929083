// Logits to logarithms of probabilities, in float64.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace vptq {

// Of logits (n_vocab): the same numbers for the same logits, wherever they stand.
class LogSoftmax {
 public:
  explicit LogSoftmax(std::span<const float> logits);

  double of(int32_t token) const { return (logits_[token] - largest_) - log_sum_; }
  // The n likeliest tokens, the likeliest first, of equal ones the lower token.
  std::vector<std::pair<int32_t, double>> top(int n) const;

 private:
  std::span<const float> logits_;
  double largest_, log_sum_;  // log(sum(e^(x - largest)))
};

}  // namespace vptq
