#include "vptq/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

#include "sampling/draw.h"
#include "sampling/likeliest.h"
#include "sampling/philox.h"
#include "vptq/error.h"

namespace vptq {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int kMaskBits = 32;

void expect(bool in_range, const char* name, double found, const char* expected) {
  if (in_range) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", found);
  throw OptionError(std::string(name) + ": found " + text + ", expected " + expected);
}

void expect_finite(bool finite) {
  if (!finite) throw OptionError("logits: found none, or NaN or infinite ones, expected finite numbers");
}

// Memory that a thread's samplers share: without top-k a vocabulary of 128K needs a MiB of it.
struct Workspace {
  std::vector<int32_t> adjusted;      // tokens
  std::vector<Candidate> given;       // not adjusted, by token
  std::vector<Candidate> candidates;  // what there is to draw from
  Likeliest likeliest;                // the same as long as it is being looked for, where not all are needed
  bool all = false;

  void start(size_t n_likeliest) {
    all = n_likeliest == 0;
    candidates.clear();
    likeliest.start(n_likeliest);
  }
  void offer(const Candidate& c) { all ? candidates.push_back(c) : likeliest.offer(c); }
  bool is_empty() const { return candidates.empty() && likeliest.is_empty(); }
  void offer(const float* logits, int begin, int end) {
    if (!all) return likeliest.offer(logits, begin, end);
    for (int token = begin; token < end; ++token) candidates.push_back({token, logits[token]});
  }
};

Workspace& workspace() {
  thread_local Workspace w;
  return w;
}

bool allows(std::span<const int32_t> mask, int token) {
  return mask.empty() || (uint32_t(mask[token / kMaskBits]) >> (token % kMaskBits) & 1);
}

// Calls run(begin, end) for tokens from first to last - 1 that the mask allows.
template <class Run>
void for_allowed(std::span<const int32_t> mask, int first, int last, const Run& run) {
  if (mask.empty()) return run(first, last);
  for (int token = first; token < last;) {
    const int bit = token % kMaskBits, left = std::min(kMaskBits - bit, last - token);
    const uint32_t word = uint32_t(mask[token / kMaskBits]) >> bit;
    const int banned = std::min(std::countr_zero(word), left);
    const int allowed = std::min(std::countr_one(word >> (banned % kMaskBits)), left - banned);
    if (allowed > 0) run(token + banned, token + banned + allowed);
    token += banned + allowed;
  }
}

}  // namespace

bool all_finite(std::span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000;  // all of it set: NaN or infinite
  uint32_t n = 0;                             // no early exit, and whole numbers: the loop becomes vector code
  for (const float value : values) n += (std::bit_cast<uint32_t>(value) & kExponent) == kExponent;
  return n == 0;
}

bool all_finite(std::span<const Candidate> candidates) {
  return std::all_of(candidates.begin(), candidates.end(), [](const Candidate& c) { return std::isfinite(c.logit); });
}

Sampler::Sampler(SamplingOptions options) : options_(std::move(options)) {
  SamplingOptions& o = options_;
  expect(o.temperature >= 0 && std::isfinite(o.temperature), "temperature", o.temperature, "a number from 0");
  expect(o.top_k >= 0, "top_k", o.top_k, "a number from 0 (off)");
  expect(o.top_p > 0 && o.top_p <= 1, "top_p", o.top_p, "a number above 0, up to 1 (off)");
  expect(o.min_p >= 0 && o.min_p <= 1, "min_p", o.min_p, "a number from 0 (off) to 1");
  expect(o.repeat_penalty > 0 && std::isfinite(o.repeat_penalty), "repeat_penalty", o.repeat_penalty,
         "a number above 0 (1: off)");
  expect(std::isfinite(o.presence_penalty), "presence_penalty", o.presence_penalty, "a number (0: off)");
  expect(std::isfinite(o.frequency_penalty), "frequency_penalty", o.frequency_penalty, "a number (0: off)");
  expect(o.min_tokens >= 0, "min_tokens", double(o.min_tokens), "a number from 0");
  for (const auto& [token, bias] : o.logit_bias)
    expect(std::isfinite(bias), "logit_bias", bias, "a number for each token");
  std::sort(o.logit_bias.begin(), o.logit_bias.end());
  std::sort(o.end_tokens.begin(), o.end_tokens.end());
}

void Sampler::accept(std::span<const int32_t> tokens, bool generated) {
  std::vector<int32_t>& window = history_.window;
  window.insert(window.end(), tokens.begin(), tokens.end());
  if (window.size() > kPenaltyWindow) window.erase(window.begin(), window.end() - kPenaltyWindow);
  if (!generated) return;
  history_.n_generated += tokens.size();
  if (!counts()) return;
  for (const int32_t token : tokens) {
    const auto at = std::ranges::lower_bound(history_.counts, token, {}, &History::Count::token);
    if (at != history_.counts.end() && at->token == token)
      ++at->n;
    else
      history_.counts.insert(at, {token, 1});
  }
}

void Sampler::adjusted_tokens(std::vector<int32_t>& out, std::span<const int32_t> drafts) const {
  out.clear();
  const auto add = [&](std::span<const int32_t> tokens) { out.insert(out.end(), tokens.begin(), tokens.end()); };
  if (options_.repeat_penalty != 1) {
    const std::span<const int32_t> window = history_.window,
                                   last = drafts.last(std::min(drafts.size(), kPenaltyWindow));
    add(window.last(std::min(window.size(), kPenaltyWindow - last.size())));
    add(last);
  }
  if (counts()) {
    for (const History::Count& count : history_.counts) out.push_back(count.token);
    add(drafts);
  }
  for (const auto& [token, bias] : options_.logit_bias) out.push_back(token);
  if (history_.n_generated + drafts.size() < uint64_t(options_.min_tokens)) add(options_.end_tokens);
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
}

size_t Sampler::n_likeliest() const { return options_.temperature == 0 ? 1 : options_.top_k; }

// An adjusted token's place is taken by the next one.
size_t Sampler::n_candidates(std::span<const int32_t> drafts) const {
  const size_t n = n_likeliest();
  if (n == 0) return 0;
  adjusted_tokens(workspace().adjusted, drafts);
  return n + workspace().adjusted.size();
}

bool Sampler::is_banned(int32_t token) const {
  return history_.n_generated < uint64_t(options_.min_tokens) &&
         std::binary_search(options_.end_tokens.begin(), options_.end_tokens.end(), token);
}

// Of one of the adjusted_tokens(), but for bans.
float Sampler::adjusted(int32_t token, float logit) const {
  double out = logit;
  if (options_.repeat_penalty != 1 && std::ranges::find(history_.window, token) != history_.window.end())
    out = out > 0 ? out / options_.repeat_penalty : out * options_.repeat_penalty;
  if (counts()) {
    const auto count = std::ranges::lower_bound(history_.counts, token, {}, &History::Count::token);
    if (count != history_.counts.end() && count->token == token)
      out -= options_.presence_penalty + options_.frequency_penalty * count->n;
  }
  const auto bias = std::ranges::lower_bound(options_.logit_bias, token, {}, &std::pair<int32_t, double>::first);
  if (bias != options_.logit_bias.end() && bias->first == token) out += bias->second;
  return float(std::clamp<double>(out, -kLargest, kLargest));
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> mask) {
  expect_finite(!logits.empty() && all_finite(logits));
  const int n_vocab = static_cast<int>(logits.size());
  if (const size_t words = mask_words(logits.size()); !mask.empty() && mask.size() != words)
    throw OptionError("mask: found " + std::to_string(mask.size()) + " words, expected " + std::to_string(words) +
                      ": a bit for each token");
  Workspace& w = workspace();
  adjusted_tokens(w.adjusted);
  for (const bool with_bans : {true, false}) {
    w.start(n_likeliest());
    const auto as_they_are = [&](int begin, int end) { w.offer(logits.data(), begin, end); };
    int begin = 0;
    for (const int32_t token : w.adjusted) {
      if (token < 0 || token >= n_vocab) continue;
      for_allowed(mask, begin, token, as_they_are);
      begin = token + 1;
      if (allows(mask, token) && !(with_bans && is_banned(token))) w.offer({token, adjusted(token, logits[token])});
    }
    for_allowed(mask, begin, n_vocab, as_they_are);
    if (!w.is_empty() || mask.empty()) break;
  }
  return choose();
}

int32_t Sampler::sample(std::span<const Candidate> candidates) {
  expect_finite(!candidates.empty() && all_finite(candidates));
  Workspace& w = workspace();
  w.given.assign(candidates.begin(), candidates.end());
  std::ranges::sort(w.given, {}, &Candidate::token);
  adjusted_tokens(w.adjusted);
  w.start(n_likeliest());
  const Candidate* before = nullptr;
  for (const Candidate& c : w.given) {
    if (before && before->token == c.token) continue;
    before = &c;
    if (!std::ranges::binary_search(w.adjusted, c.token))
      w.offer(c);
    else if (!is_banned(c.token))
      w.offer({c.token, adjusted(c.token, c.logit)});
  }
  return choose();
}

// From what the workspace has been offered.
int32_t Sampler::choose() {
  Workspace& w = workspace();
  if (w.is_empty()) throw OptionError("found no token to draw from, expected one that is not banned");
  if (!w.all) {
    const std::span<const Candidate> sorted = w.likeliest.sorted();
    w.candidates.assign(sorted.begin(), sorted.end());
  }
  const int32_t token = options_.temperature == 0
                            ? w.candidates[0].token
                            : draw(w.candidates, !w.all, options_, uniform(options_.seed, history_.n_generated));
  accept({&token, 1}, true);
  return token;
}

}  // namespace vptq
