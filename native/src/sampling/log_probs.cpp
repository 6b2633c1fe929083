#include "sampling/log_probs.h"

#include <algorithm>
#include <cmath>

#include "sampling/likeliest.h"

namespace vptq {

LogSoftmax::LogSoftmax(std::span<const float> logits) : logits_(logits), largest_(std::ranges::max(logits)) {
  constexpr size_t kAtOnce = 256;  // added up by themselves, so that no sum has many terms
  double total = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kAtOnce) {
    double sum = 0;
    for (const float x : logits.subspan(begin, std::min(kAtOnce, logits.size() - begin))) sum += std::exp(x - largest_);
    total += sum;
  }
  log_sum_ = std::log(total);
}

std::vector<std::pair<int32_t, double>> LogSoftmax::top(int n) const {
  Likeliest likeliest;
  likeliest.start(size_t(n));
  likeliest.offer(logits_.data(), 0, static_cast<int>(logits_.size()));
  std::vector<std::pair<int32_t, double>> out;
  for (const Candidate& c : likeliest.sorted()) out.emplace_back(c.token, of(c.token));
  return out;
}

}  // namespace vptq
