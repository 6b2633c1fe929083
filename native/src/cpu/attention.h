// Attention on the CPU: which query heads and tokens share a look at the cache, and how they are shared out to threads.
#pragma once

#include <vector>

#include "backend.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace vptq::cpu {

class Attention {
 public:
  Attention(const Kernels& kernels, ThreadPool& threads) : kernels_(kernels), threads_(threads) {}

  // As Backend::attention has it.
  void run(const Batch& batch, const KvLayout& layout, int layer, int n_head, int window, const float* q, float* out);

 private:
  struct Call;
  struct Item;
  // Tokens of one sequence, by their places in the batch, that share a look at the cache.
  struct Tokens {
    int begin, end;
  };

  void share_out(const Batch& batch, int most_tokens);
  Item item(const Call& call, int64_t i) const;
  float* sums(const Call& call, int64_t place, int64_t row);
  void attend(const Call& call, Item& item, int span, int64_t place);
  void add(const Call& call, const Item& item, int span, int64_t place);
  void finish(const Call& call, const Item& item);

  const Kernels& kernels_;
  ThreadPool& threads_;
  std::vector<Tokens> tokens_;
  std::vector<float> sums_;  // (places, tokens of the batch, n_head) times AttentionSums
};

}  // namespace vptq::cpu
