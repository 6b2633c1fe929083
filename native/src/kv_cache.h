// The keys and values of many sequences, in blocks that come from one pool.
#pragma once

#include <vector>

#include "backend.h"

namespace vptq {

class KvCache {
 public:
  KvCache(Backend& backend, const KvLayout& layout, int n_ctx) : backend_(backend), layout_(layout), n_ctx_(n_ctx) {}

  const KvLayout& layout() const { return layout_; }

  // A new, empty sequence with blocks for n_tokens tokens. Throws OptionError (more than n_ctx), OutOfMemoryError.
  int new_sequence(int n_tokens);
  void free_sequence(int id);
  // Blocks for n_tokens tokens in all; throws as new_sequence does.
  void reserve(int id, int n_tokens);
  // Forgets all but the first n_tokens tokens, and gives back the blocks behind them, reserved ones too.
  void truncate(int id, int n_tokens);
  int length(int id) const;

  // Lengthens a sequence by n tokens; throws OptionError past n_ctx, OutOfMemoryError.
  void extend(int id, int n);
  const std::vector<std::byte*>& blocks(int id) const;

  size_t bytes(int64_t n_tokens) const;  // that a sequence of so many tokens takes
  // Throws OutOfMemoryError if n_tokens more tokens, and weights of so many bytes, could not be held.
  void check_memory(int64_t n_tokens, size_t weights = 0) const;

 private:
  struct Sequence {
    bool used = false;
    int n_tokens = 0;
    std::vector<std::byte*> blocks;
  };

  const Sequence& at(int id) const;
  void reserve(Sequence& sequence, int64_t n_tokens);
  void keep_blocks(Sequence& sequence, int64_t n);  // the first n; the others go back to the pool

  Backend& backend_;
  KvLayout layout_;
  int n_ctx_;
  std::vector<Sequence> sequences_;  // by id; ids of freed sequences are used again
  std::vector<std::byte*> free_blocks_;
};

}  // namespace vptq
