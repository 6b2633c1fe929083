// Logits to token, for one sequence.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "vptq/candidate.h"

namespace vptq {

struct SamplingOptions {
  float temperature = 0.8f;     // 0: greedy
  int top_k = 40;               // 0: off
  float top_p = 0.95f;          // 1: off
  float min_p = 0.05f;          // 0: off
  float repeat_penalty = 1.0f;  // 1: off
  uint64_t seed = 0;
};

bool all_finite(std::span<const float> values);
bool all_finite(std::span<const Candidate> candidates);

class Sampler {
 public:
  // Throws OptionError.
  explicit Sampler(const SamplingOptions& options);

  // Adds tokens (the prompt) to the history that the repeat penalty looks at.
  void accept(std::span<const int32_t> tokens);

  // Draws a token from logits (n_vocab) and adds it to the history. In this order: repeat penalty over the last 64
  // tokens, top-k, top-p, min-p, temperature. Throws OptionError where a logit is not finite.
  int32_t sample(std::span<const float> logits);

  // The same token from a part of the logits: from the n_candidates() largest, of equal ones those of the lower tokens,
  // and those of the penalised_tokens() that there are. Others do no harm, nor one that stands there twice.
  int32_t sample(std::span<const Candidate> candidates);
  size_t n_candidates() const;                        // 0: all logits are needed
  std::span<const int32_t> penalised_tokens() const;  // as accepted: numbers that are no tokens, too

 private:
  float penalised(float logit) const;
  int32_t greedy(std::span<const float> logits) const;
  int32_t draw();

  SamplingOptions options_;
  std::mt19937_64 random_;
  std::vector<int32_t> history_;  // the last tokens, oldest first
  std::vector<float> penalised_;
  std::vector<Candidate> candidates_;
};

}  // namespace vptq
