#include "sampling/outputs.h"

#include <algorithm>
#include <string>

#include "sampling/log_probs.h"
#include "vptq/error.h"

namespace vptq {
namespace {

constexpr int kMostTop = 64;  // of log_probs

std::string feed_text(size_t feed) { return "feed " + std::to_string(feed) + ": "; }

}  // namespace

void Outputs::start(size_t n_feeds) {
  feeds_.assign(n_feeds, {0, 0});
  next_.clear();
  for_samplers_only_ = has_top_ = is_there_ = false;
  logits_.reset();
}

void Outputs::add(size_t place, const Feed& feed) {
  const size_t n = feed.want == Want::none ? 0 : feed.want == Want::last ? 1 : feed.tokens.size();
  feeds_[place] = {next_.size(), n};
  const auto wanted = feed.tokens.last(n);
  if (n > 0) next_.insert(next_.end(), wanted.begin() + 1, wanted.end());
  if (n > 0) next_.push_back(-1);
}

// The tokens of the vocabulary whose logits a sampler does not use as they are.
std::span<const int32_t> Outputs::adjusted_tokens(const Sampler& sampler, std::span<const int32_t> drafts) {
  sampler.adjusted_tokens(adjusted_, drafts);
  const auto first = std::ranges::lower_bound(adjusted_, 0), last = std::ranges::lower_bound(adjusted_, n_vocab_);
  return {first, last};
}

void Outputs::ask(std::span<const Feed> feeds, int max_top_logits) {
  size_t n_largest = 1, n_tokens = 0;
  const auto for_rows = [&](const auto& of_row) {
    for (size_t i = 0; i < feeds.size(); ++i)
      for (size_t r = 0; r < feeds_[i].n; ++r)
        if (!of_row(*feeds[i].sampler, feeds_[i].begin + r, feeds[i].tokens.last(feeds_[i].n).subspan(1, r)))
          return false;
    return true;
  };
  for_samplers_only_ = n() > 0;
  for (size_t i = 0; i < feeds.size(); ++i)
    if (feeds_[i].n > 0 && !feeds[i].sampler) for_samplers_only_ = false;
  if (!for_samplers_only_) return;
  // One of two feeds: what it adjusts in the second depends on what it draws in the first.
  for (size_t i = 0; i < feeds.size(); ++i)
    for (size_t j = 0; j < i; ++j)
      if (feeds_[i].n > 0 && feeds_[j].n > 0 && feeds[i].sampler == feeds[j].sampler) return;
  has_top_ = for_rows([&](const Sampler& sampler, size_t, std::span<const int32_t> drafts) {
    const size_t n = sampler.n_candidates(drafts);
    n_largest = std::max(n_largest, n);
    n_tokens = std::max(n_tokens, adjusted_tokens(sampler, drafts).size());
    return n > 0 && n <= size_t(max_top_logits);
  });
  if (!has_top_) return;
  top_.n_vocab = n_vocab_;
  top_.n_largest = static_cast<int>(std::min(n_largest, size_t(n_vocab_)));
  top_.n_tokens = static_cast<int>(n_tokens);
  top_.tokens.assign(n() * n_tokens, 0);  // where there are fewer, that of token 0 does no harm
  for_rows([&](const Sampler& sampler, size_t row, std::span<const int32_t> drafts) {
    std::ranges::copy(adjusted_tokens(sampler, drafts), top_.tokens.begin() + row * n_tokens);
    return true;
  });
}

void Outputs::bring(std::shared_ptr<float[]> logits) {
  logits_ = std::move(logits);
  is_there_ = true;
}

bool Outputs::is_finite() const {
  return has_top_ ? all_finite(top_.found) : all_finite({logits_.get(), n() * size_t(n_vocab_)});
}

const Outputs::Rows& Outputs::rows(int feed) const {
  if (!is_there_) throw OptionError("no batch has come to its end");
  if (feed < 0 || size_t(feed) >= feeds_.size())
    throw OptionError("feed " + std::to_string(feed) + ", expected 0 to " + std::to_string(feeds_.size() - 1));
  return feeds_[feed];
}

void Outputs::expect_all_logits() const {
  if (for_samplers_only_)
    throw OptionError("the batch's logits are for its samplers only: expected no sampler for a feed of it");
}

void Outputs::check(std::span<Sampler* const> samplers, std::span<const std::span<const int32_t>> masks) const {
  if (!is_there_) throw OptionError("no batch has come to its end");
  const auto expect_for_each = [&](size_t n, const char* what) {
    if (n != feeds_.size())
      throw OptionError(std::to_string(n) + " " + what + ", expected one a feed: " + std::to_string(feeds_.size()));
  };
  expect_for_each(samplers.size(), "samplers");
  if (!masks.empty()) expect_for_each(masks.size(), "masks");
  for (size_t i = 0; i < feeds_.size(); ++i) {
    if (samplers[i] && feeds_[i].n == 0)
      throw OptionError(feed_text(i) + "found a sampler, expected none: no logits of it were wanted");
    if (masks.empty() || masks[i].empty()) continue;
    expect_all_logits();
    const size_t words = feeds_[i].n * mask_words(size_t(n_vocab_));
    if (masks[i].size() != words)
      throw OptionError(feed_text(i) + "found a mask of " + std::to_string(masks[i].size()) + " words, expected " +
                        std::to_string(words) + ": a bit for each token, for each of its wanted tokens");
  }
}

void Outputs::sample(std::span<Sampler* const> samplers, std::span<const std::span<const int32_t>> masks,
                     std::vector<std::vector<int32_t>>& out) {
  check(samplers, masks);
  out.resize(samplers.size());
  histories_.resize(samplers.size());
  for (size_t i = 0; i < samplers.size(); ++i)
    if (samplers[i]) histories_[i] = samplers[i]->history();
  try {
    for (size_t i = 0; i < samplers.size(); ++i) {
      out[i].clear();
      if (!samplers[i]) continue;
      const std::span<const int32_t> mask = masks.empty() ? std::span<const int32_t>() : masks[i];
      const size_t words = mask.size() / feeds_[i].n;  // of a row
      for (size_t r = 0; r < feeds_[i].n; ++r) {
        out[i].push_back(draw(i, feeds_[i].begin + r, *samplers[i], mask.subspan(r * words, words)));
        if (out[i].back() != next_[feeds_[i].begin + r]) break;
      }
    }
  } catch (...) {
    for (size_t i = 0; i < samplers.size(); ++i)
      if (samplers[i]) samplers[i]->go_back(histories_[i]);
    throw;
  }
}

int32_t Outputs::draw(size_t feed, size_t row, Sampler& sampler, std::span<const int32_t> mask) {
  if (!has_top_) return sampler.sample(this->row(row), mask);
  const size_t n = sampler.n_candidates();
  const std::span<const int32_t> needed = adjusted_tokens(sampler);
  const std::span<const int32_t> asked(top_.tokens.data() + row * top_.n_tokens, size_t(top_.n_tokens));
  if (n == 0 || std::min(n, size_t(n_vocab_)) > size_t(top_.n_largest) || needed.size() > asked.size() ||
      !std::ranges::equal(needed, asked.first(needed.size())))
    throw OptionError(feed_text(feed) + "expected its sampler as it was when the feed came");
  const size_t size = top_.row_size();
  return sampler.sample(std::span<const Candidate>(top_.found.data() + row * size, size));
}

LogProbs Outputs::log_probs(int feed, std::span<const int32_t> tokens, int n_top) const {
  const Rows& rows = this->rows(feed);
  expect_all_logits();
  if (n_top < 0 || n_top > kMostTop)
    throw OptionError("n_top: found " + std::to_string(n_top) + ", expected 0 to " + std::to_string(kMostTop));
  if (tokens.size() > rows.n)
    throw OptionError(feed_text(size_t(feed)) + "found " + std::to_string(tokens.size()) +
                      " tokens, expected at most one for each of its " + std::to_string(rows.n) + " wanted ones");
  for (const int32_t token : tokens)
    if (token < 0 || token >= n_vocab_)
      throw OptionError("token " + std::to_string(token) + ", expected 0 to " + std::to_string(n_vocab_ - 1));
  LogProbs out;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const LogSoftmax log_softmax(row(rows.begin + i));
    out.tokens.push_back(log_softmax.of(tokens[i]));
    out.top.push_back(log_softmax.top(n_top));
  }
  return out;
}

Logits Outputs::logits(int feed) const {
  const Rows& rows = this->rows(feed);
  expect_all_logits();
  return {{logits_, logits_.get() + rows.begin * n_vocab_}, rows.n};
}

}  // namespace vptq
