// The few likeliest of many tokens.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "vptq/candidate.h"

namespace vptq {

// The lower token first where logits are equal: the order, and so the draw, is the same everywhere.
inline bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

// Of tokens that are offered in ascending order the k likeliest.
class Likeliest {
 public:
  void start(size_t k) {
    k_ = k;
    heap_.clear();
  }

  void offer(const Candidate& c) {
    if (heap_.size() < k_) {
      heap_.push_back(c);
      std::push_heap(heap_.begin(), heap_.end(), likelier);
    } else if (k_ > 0 && likelier(c, heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), likelier);
      heap_.back() = c;
      std::push_heap(heap_.begin(), heap_.end(), likelier);
    }
  }

  // The tokens from begin to end - 1, each with logits[token].
  void offer(const float* logits, int begin, int end) {
    constexpr int kAtOnce = 16;  // looked at without a branch for each
    int token = begin;
    for (; token < end && heap_.size() < k_; ++token) offer({token, logits[token]});
    for (; token + kAtOnce <= end; token += kAtOnce) {
      bool any = false;  // an equal one is not likelier than those before it
      for (int i = 0; i < kAtOnce; ++i) any |= logits[token + i] > least();
      if (any)
        for (int i = 0; i < kAtOnce; ++i) offer({token + i, logits[token + i]});
    }
    for (; token < end; ++token) offer({token, logits[token]});
  }

  bool is_empty() const { return heap_.empty(); }
  // The likeliest first; then start() again.
  std::span<const Candidate> sorted() {
    std::sort_heap(heap_.begin(), heap_.end(), likelier);
    return heap_;
  }

 private:
  float least() const { return heap_.empty() ? 0 : heap_.front().logit; }

  size_t k_ = 0;
  std::vector<Candidate> heap_;  // the least likely one on top
};

}  // namespace vptq
