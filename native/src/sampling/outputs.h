// What a batch gives: the logits of the tokens that they are wanted of, or of these what samplers need; and what can be
// asked of them.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend.h"
#include "vptq/context.h"

namespace vptq {

class Outputs {
 public:
  explicit Outputs(int n_vocab) : n_vocab_(n_vocab) {}

  // First the batch's feeds, those whose logits come first in it first. No logits are there yet.
  void start(size_t n_feeds);
  void add(size_t place, const Feed& feed);
  size_t n() const { return next_.size(); }  // rows of logits

  // Where all feeds that want logits have samplers, and these need but a part that the backend finds, only that is
  // brought, in top(); else all logits are. max_top_logits: the backend's.
  void ask(std::span<const Feed> feeds, int max_top_logits);
  TopLogits* top() { return has_top_ ? &top_ : nullptr; }
  void bring(std::shared_ptr<float[]> logits);  // (n(), n_vocab); empty where top() is all
  bool is_finite() const;

  // As Context has them.
  void sample(std::span<Sampler* const> samplers, std::span<const std::span<const int32_t>> masks,
              std::vector<std::vector<int32_t>>& out);
  LogProbs log_probs(int feed, std::span<const int32_t> tokens, int n_top) const;
  Logits logits(int feed) const;

 private:
  struct Rows {
    size_t begin, n;
  };

  const Rows& rows(int feed) const;
  std::span<const float> row(size_t i) const { return {logits_.get() + i * n_vocab_, size_t(n_vocab_)}; }
  void expect_all_logits() const;
  void check(std::span<Sampler* const> samplers, std::span<const std::span<const int32_t>> masks) const;
  std::span<const int32_t> adjusted_tokens(const Sampler& sampler, std::span<const int32_t> drafts = {});
  int32_t draw(size_t feed, size_t row, Sampler& sampler, std::span<const int32_t> mask);

  int n_vocab_;
  std::vector<Rows> feeds_;
  std::vector<int32_t> next_;  // (n()) the token that the feed has behind this one; -1: none
  bool for_samplers_only_ = false;
  bool has_top_ = false;
  TopLogits top_{};
  std::shared_ptr<float[]> logits_;  // (n(), n_vocab), unless has_top_
  bool is_there_ = false;
  std::vector<int32_t> adjusted_;            // of one sampler
  std::vector<Sampler::History> histories_;  // of the samplers, before they draw
};

}  // namespace vptq
