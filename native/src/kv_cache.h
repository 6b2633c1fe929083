// The keys and values of many sequences, in blocks. A block is some tokens' keys and values of all layers: where
// several backends share the layers, as many pieces of memory, each from the pool of its backend.
#pragma once

#include <vector>

#include "backend.h"

namespace vptq {

class KvCache {
 public:
  struct Part {
    Backend& backend;
    KvLayout layout;  // of its layers
  };

  KvCache(const std::vector<Part>& parts, int n_ctx);

  const KvLayout& layout(size_t part) const { return pools_[part].layout; }

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
  const std::vector<std::byte*>& blocks(int id, size_t part) const;

  // Throws OutOfMemoryError if n_tokens more tokens could not be held.
  void check_memory(int64_t n_tokens) const;

 private:
  using Blocks = std::vector<std::byte*>;
  struct Sequence {
    bool used = false;
    int n_tokens = 0;
    std::vector<Blocks> blocks;  // (parts)
  };
  struct Pool : Part {
    Blocks free;
  };

  const Sequence& at(int id) const;
  void reserve(Sequence& sequence, int64_t n_tokens);
  void keep_blocks(Sequence& sequence, int64_t n);  // the first n; the others go back to their pools

  int n_ctx_;
  std::vector<Sequence> sequences_;  // by id; ids of freed sequences are used again
  std::vector<Pool> pools_;          // (parts)
};

}  // namespace vptq
