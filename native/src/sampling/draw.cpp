#include "sampling/draw.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <span>

#include "sampling/likeliest.h"

namespace vptq {
namespace {

constexpr int kSums = 8;  // that are added up side by side

// e^x to float32 accuracy for x <= 0: x = n ln 2 + r, a polynomial in r, the exponent by its bits. In plain operations,
// that the compiler makes vector code of: the same number on every machine.
float exponential(float x) {
  constexpr float kToWhole = 0x1.8p23f;  // added to a small number it leaves the nearest whole one in the last bits
  x = x > -87.0f ? x : -87.0f;           // below, weights of 1e-38
  const float shifted = x * 1.44269504f + kToWhole;
  const float n = shifted - kToWhole;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) p = p * r + c;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

// Proportional to the candidates' probabilities. What float32 rounds here is less than it rounds in the logits.
void get_weights(std::span<const Candidate> candidates, float largest, float temperature, std::vector<float>& out) {
  out.resize(candidates.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = exponential((candidates[i].logit - largest) / temperature);
}

double sum_of(const std::vector<float>& weights) {
  double sums[kSums] = {}, total = 0;
  size_t i = 0;
  for (; i + kSums <= weights.size(); i += kSums)
    for (int j = 0; j < kSums; ++j) sums[j] += weights[i + j];
  for (; i < weights.size(); ++i) total += weights[i];
  for (const double sum : sums) total += sum;
  return total;
}

// Buckets of weights from 0 to 1: floats that are not negative are in the order of their bits.
constexpr int kBucketShift = 20;  // leaves the exponent and three bits
size_t bucket_of(float weight) { return std::bit_cast<uint32_t>(weight) >> kBucketShift; }

// Keeps the likeliest, as few as it takes for their weights to reach `top`, in the order that they are in.
void keep_top(std::vector<Candidate>& candidates, bool sorted, double top, const std::vector<float>& weights) {
  if (sorted) {
    size_t n = 0;
    for (double sum = 0; n < weights.size() && sum < top; ++n) sum += weights[n];
    candidates.resize(std::max<size_t>(n, 1));
    return;
  }
  // All of the larger buckets, and what it takes of the next one, which alone has to be put in order.
  std::array<double, (127 << 23 >> kBucketShift) + 1> sums{};
  for (const float weight : weights) sums[bucket_of(weight)] += weight;
  size_t bucket = sums.size() - 1;
  for (; bucket > 0 && sums[bucket] < top; --bucket) top -= sums[bucket];
  thread_local std::vector<size_t> places;
  places.clear();
  for (size_t i = 0; i < weights.size(); ++i)
    if (bucket_of(weights[i]) == bucket) places.push_back(i);
  if (places.empty()) return;  // all of them do not reach it
  std::ranges::sort(places, [&](size_t a, size_t b) { return likelier(candidates[a], candidates[b]); });
  size_t n = 0;
  for (double sum = 0; n < places.size() && sum < top; ++n) sum += weights[places[n]];
  const Candidate last = candidates[places[std::max<size_t>(n, 1) - 1]];
  std::erase_if(candidates, [&](const Candidate& c) { return likelier(last, c); });
}

}  // namespace

int32_t draw(std::vector<Candidate>& candidates, bool sorted, const SamplingOptions& options, double at) {
  thread_local std::vector<float> weights;
  float largest = candidates[0].logit;
  if (!sorted)
    for (const Candidate& c : candidates) largest = c.logit > largest ? c.logit : largest;

  double top = 0;  // what top-p wants of the sum of all weights
  if (options.top_p < 1) {
    get_weights(candidates, largest, 1, weights);
    top = options.top_p * sum_of(weights);
  }
  if (options.min_p > 0) {  // both keep so many of the likeliest, so the one that needs no order can come first
    const double least = largest + std::log(double{options.min_p});
    std::erase_if(candidates, [&](const Candidate& c) { return c.logit < least; });
    if (options.top_p < 1) get_weights(candidates, largest, 1, weights);
  }
  if (options.top_p < 1) keep_top(candidates, sorted, top, weights);

  get_weights(candidates, largest, options.temperature, weights);
  at *= sum_of(weights);
  for (size_t i = 0; i < weights.size(); ++i) {
    at -= weights[i];
    if (at < 0) return candidates[i].token;
  }
  return candidates.back().token;
}

}  // namespace vptq
