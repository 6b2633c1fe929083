#include "vptq/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

#include "vptq/error.h"

namespace vptq {
namespace {

constexpr size_t kPenaltyWindow = 64;  // tokens

void expect(bool in_range, const char* name, double found, const char* expected) {
  if (in_range) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", found);
  throw OptionError(std::string(name) + ": found " + text + ", expected " + expected);
}

void expect_finite(bool finite) {
  if (!finite) throw OptionError("logits: found none, or NaN or infinite ones, expected finite numbers");
}

// The lower token first where logits are equal: the order, and so the draw, is the same everywhere.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

}  // namespace

bool all_finite(std::span<const float> values) {
  bool finite = true;  // no early exit: the loop becomes vector code
  for (const float value : values) finite &= std::abs(value) <= std::numeric_limits<float>::max();
  return finite;
}

bool all_finite(std::span<const Candidate> candidates) {
  return std::all_of(candidates.begin(), candidates.end(), [](const Candidate& c) { return std::isfinite(c.logit); });
}

Sampler::Sampler(const SamplingOptions& o) : options_(o), random_(o.seed) {
  expect(o.temperature >= 0 && std::isfinite(o.temperature), "temperature", o.temperature, "a number from 0");
  expect(o.top_k >= 0, "top_k", o.top_k, "a number from 0 (off)");
  expect(o.top_p > 0 && o.top_p <= 1, "top_p", o.top_p, "a number above 0, up to 1 (off)");
  expect(o.min_p >= 0 && o.min_p <= 1, "min_p", o.min_p, "a number from 0 (off) to 1");
  expect(o.repeat_penalty > 0 && std::isfinite(o.repeat_penalty), "repeat_penalty", o.repeat_penalty,
         "a number above 0 (1: off)");
}

void Sampler::accept(std::span<const int32_t> tokens) {
  history_.insert(history_.end(), tokens.begin(), tokens.end());
  if (history_.size() > kPenaltyWindow) history_.erase(history_.begin(), history_.end() - kPenaltyWindow);
}

int32_t Sampler::sample(std::span<const float> logits) {
  expect_finite(!logits.empty() && all_finite(logits));
  if (options_.repeat_penalty != 1) {
    penalised_.assign(logits.begin(), logits.end());
    for (const int32_t token : history_) {
      if (token < 0 || size_t(token) >= logits.size()) continue;
      penalised_[token] = penalised(logits[token]);  // of a token that stands there twice: once
    }
    logits = penalised_;
  }
  int32_t token;
  if (options_.temperature == 0) {
    token = greedy(logits);
  } else {
    candidates_.clear();
    for (size_t i = 0; i < logits.size(); ++i) candidates_.push_back({int32_t(i), logits[i]});
    token = draw();
  }
  accept({&token, 1});
  return token;
}

int32_t Sampler::sample(std::span<const Candidate> candidates) {
  expect_finite(!candidates.empty() && all_finite(candidates));
  candidates_.assign(candidates.begin(), candidates.end());
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  const auto same = [](const Candidate& a, const Candidate& b) { return a.token == b.token; };
  candidates_.erase(std::unique(candidates_.begin(), candidates_.end(), same), candidates_.end());
  const std::span<const int32_t> history = penalised_tokens();
  for (Candidate& c : candidates_)
    if (std::find(history.begin(), history.end(), c.token) != history.end()) c.logit = penalised(c.logit);
  const int32_t token =
      options_.temperature == 0 ? std::min_element(candidates_.begin(), candidates_.end(), likelier)->token : draw();
  accept({&token, 1});
  return token;
}

// A penalised token's place is taken by the next one: of as many as there can be.
size_t Sampler::n_candidates() const {
  const size_t n = options_.temperature == 0 ? 1 : options_.top_k;
  return n && options_.repeat_penalty != 1 ? n + kPenaltyWindow : n;
}

std::span<const int32_t> Sampler::penalised_tokens() const {
  if (options_.repeat_penalty == 1) return {};
  return history_;
}

float Sampler::penalised(float logit) const {
  return logit > 0 ? logit / options_.repeat_penalty : logit * options_.repeat_penalty;
}

int32_t Sampler::greedy(std::span<const float> logits) const {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

int32_t Sampler::draw() {
  size_t n = candidates_.size();
  if (options_.top_k > 0) n = std::min(n, size_t(options_.top_k));
  std::partial_sort(candidates_.begin(), candidates_.begin() + n, candidates_.end(), likelier);
  const double max_logit = candidates_[0].logit;
  const auto weight = [&](size_t i, double temperature) {
    return std::exp((candidates_[i].logit - max_logit) / temperature);
  };

  if (options_.top_p < 1) {
    double total = 0, sum = 0;
    for (size_t i = 0; i < n; ++i) total += weight(i, 1);
    size_t kept = 0;
    while (kept < n && sum < options_.top_p * total) sum += weight(kept++, 1);
    n = std::max<size_t>(kept, 1);
  }
  if (options_.min_p > 0) {
    size_t kept = 1;
    while (kept < n && weight(kept, 1) >= options_.min_p) ++kept;
    n = kept;
  }
  double total = 0;
  for (size_t i = 0; i < n; ++i) total += weight(i, options_.temperature);
  // 53 bits, by hand: the standard library's distributions differ between implementations.
  double at = double(random_() >> 11) * 0x1p-53 * total;
  for (size_t i = 0; i < n; ++i) {
    at -= weight(i, options_.temperature);
    if (at < 0) return candidates_[i].token;
  }
  return candidates_[n - 1].token;
}

}  // namespace vptq
