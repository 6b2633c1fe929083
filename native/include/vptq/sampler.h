// Logits to token, for one sequence.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
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
  double presence_penalty = 0, frequency_penalty = 0;  // 0: off
  std::vector<std::pair<int32_t, double>> logit_bias;  // tokens, and what is added to their logits
  int64_t min_tokens = 0;                              // the end tokens are banned until so many are generated
  std::vector<int32_t> end_tokens;
};

// A mask has a bit for each token: bit t % 32 of word t / 32 says whether token t is allowed.
constexpr size_t mask_words(size_t n_vocab) { return (n_vocab + 31) / 32; }

bool all_finite(std::span<const float> values);
bool all_finite(std::span<const Candidate> candidates);

// What number n is drawn with depends on the seed and n alone: a new Sampler that has accepted the same tokens goes on
// where another one was.
class Sampler {
 public:
  static constexpr size_t kPenaltyWindow = 64;  // tokens that the repeat penalty looks at

  // What it remembers of the tokens that it has accepted.
  struct History {
    struct Count {
      int32_t token, n;
    };
    std::vector<int32_t> window;  // the last ones, oldest first
    std::vector<Count> counts;    // of generated ones, by token; empty where no penalty needs them
    uint64_t n_generated = 0;     // the number of the next draw
  };

  // Throws OptionError.
  explicit Sampler(SamplingOptions options);

  // Adds tokens to the history: a prompt's, or generated ones, each of which is one draw.
  void accept(std::span<const int32_t> tokens, bool generated = false);

  // Draws a token from logits (n_vocab) and adds it to the history. First they are adjusted: repeat penalty over the
  // last 64 tokens, presence and frequency penalty (logit -= presence * (count > 0) + frequency * count of generated
  // ones: OpenAI's API reference), bias, bans. Then top-k, top-p, min-p, temperature.
  // mask (mask_words(n_vocab)), or empty. Where it allows only end tokens that min_tokens bans, they are not banned.
  // Throws OptionError where a logit is not finite, and where no token is left.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> mask = {});

  // The same token from a part of the logits: from the n_candidates() largest, of equal ones those of the lower tokens,
  // and those of the adjusted_tokens() that there are. Others do no harm, nor one that stands there twice.
  int32_t sample(std::span<const Candidate> candidates);

  // Both as they would be if `drafts` had been generated, too.
  size_t n_candidates(std::span<const int32_t> drafts = {}) const;  // 0: all logits are needed
  // Whose logits are not used as they are, ascending; as accepted: numbers that are no tokens, too.
  void adjusted_tokens(std::vector<int32_t>& out, std::span<const int32_t> drafts = {}) const;

  const History& history() const { return history_; }
  void go_back(const History& to) { history_ = to; }

 private:
  bool counts() const { return options_.presence_penalty != 0 || options_.frequency_penalty != 0; }
  bool is_banned(int32_t token) const;
  float adjusted(int32_t token, float logit) const;
  size_t n_likeliest() const;  // that are needed once they are adjusted; 0: all
  int32_t choose();

  SamplingOptions options_;
  History history_;
};

}  // namespace vptq
