// The keys and values of many sequences, in blocks that they can share. A block is some tokens' keys and values of all
// layers: where several backends share the layers, as many pieces of memory under one number, each from the pool of its
// backend.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "backend.h"

namespace vptq {

// The type that option kv_type names. Throws OptionError, also for q8_0 where its blocks do not divide head_dim.
DType kv_type_of(const std::string& name, int head_dim);

class KvCache {
 public:
  struct Part {
    Backend& backend;
    KvLayout layout;  // of its layers
  };

  KvCache(const std::vector<Part>& parts, int n_ctx, int64_t n_blocks);

  const KvLayout& layout(size_t part) const { return pools_[part].layout; }

  // Throws OutOfMemoryError if n_tokens more tokens could not be held.
  void check_memory(int64_t n_tokens) const;
  // The numbers that blocks can have: 0 to n_blocks() - 1. Where memory ends before, they are those that fit into it,
  // until there is no sequence: then what memory there is counts again. Not earlier: whoever has to give way for want
  // of memory would be let in again at once.
  void allow(int64_t n_blocks);
  int64_t n_blocks() const;
  int64_t n_free_blocks() const { return n_blocks() - int64_t(blocks_.size()) + int64_t(free_.size()); }

  // A new sequence that begins with these blocks: full ones, in use or held. Throws OptionError.
  int new_sequence(std::span<const int32_t> prefix);
  void free_sequence(int id);
  // Forgets all but the first n_tokens tokens, and gives back the blocks behind them. Throws OptionError where a part
  // of a block would be left that others use, too.
  void truncate(int id, int n_tokens);
  int length(int id) const;
  std::span<const int32_t> blocks(int id) const;  // in the order of its tokens, reserved ones at the end

  // One more user of each block, which must be in use, and one fewer, where it is held. Throw OptionError.
  void hold(std::span<const int32_t> blocks);
  void release(std::span<const int32_t> blocks);

  // Tokens come in two steps: blocks are there for n more of a sequence's, then either the tokens are, or the blocks
  // are given back. Throws OptionError past n_ctx, OutOfMemoryError where no blocks are left, or no memory for them.
  void reserve(int id, int n);
  void commit(int id, int n);
  void give_back(int id);

  // Of a busy sequence nothing changes but by commit() and give_back().
  void set_busy(int id, bool busy);
  void check_idle(int id) const;  // throws OptionError where it is busy, or not there

  // Adds where the sequence's blocks lie.
  void append_memory(int id, size_t part, std::vector<std::byte*>& out) const;

 private:
  struct Sequence {
    bool used = false, busy = false;
    int n_tokens = 0;
    std::vector<int32_t> blocks;
  };
  struct Block {
    int32_t n_sequences = 0, n_holds = 0;
    int8_t n_tokens = 0;  // that it holds: those from there on can still be written

    int64_t n_users() const { return int64_t{n_sequences} + n_holds; }
  };
  struct Pool : Part {
    std::vector<std::byte*> memory;  // by block
  };

  const Sequence& at(int id) const;
  Sequence& idle(int id);
  void check_in_use(int32_t block) const;
  std::string lack(int64_t n_blocks) const;  // of memory; empty where there is enough
  void make_room(int64_t n);
  int64_t n_that_fit() const;
  size_t n_with_memory() const;  // blocks, in all pools
  int32_t take();
  void drop(int32_t block);
  void free_if_unused(int32_t block);
  void keep_blocks(Sequence& sequence, int64_t n);  // the first n

  int n_ctx_;
  int64_t n_blocks_, most_blocks_;   // while there are sequences, and where memory lasts
  std::vector<Sequence> sequences_;  // by id; ids of freed sequences are used again
  std::vector<Pool> pools_;          // (parts)
  std::vector<Block> blocks_;        // by number: those that have been used
  std::vector<int32_t> free_;        // of these; the last one is the next
};

}  // namespace vptq
