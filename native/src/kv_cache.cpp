#include "kv_cache.h"

#include <algorithm>

#include "vptq/error.h"

namespace vptq {

KvCache::KvCache(const std::vector<Part>& parts, int n_ctx) : n_ctx_(n_ctx) {
  for (const Part& part : parts) pools_.push_back({part, {}});
}

void KvCache::check_memory(int64_t n_tokens) const {
  for (const Pool& pool : pools_) {
    const double need = double(KvLayout::blocks_for(n_tokens)) * double(pool.layout.block_bytes());
    const auto available = double(pool.backend.available_memory());
    if (need > available)
      throw OutOfMemoryError("the KV cache for " + std::to_string(n_tokens) + " tokens (option n_ctx) needs " +
                             gib(need) + (pools_.size() > 1 ? " on " + pool.backend.description() : "") + ", " +
                             gib(available) + " are available; a smaller n_ctx, or kv_type q8_0, needs less");
  }
}

void KvCache::reserve(Sequence& sequence, int64_t n_tokens) {
  if (n_tokens > n_ctx_)
    throw OptionError("a sequence of " + std::to_string(n_tokens) + " tokens, expected at most the context of " +
                      std::to_string(n_ctx_) + " (option n_ctx)");
  sequence.blocks.resize(pools_.size());
  const auto lacking = [&](size_t part) {
    return std::max<int64_t>(KvLayout::blocks_for(n_tokens) - int64_t(sequence.blocks[part].size()), 0);
  };
  const auto fresh = [&](size_t part) { return lacking(part) - int64_t(pools_[part].free.size()); };
  // All pools have the same blocks free, unless memory ended while they got theirs.
  if (fresh(0) > 0) check_memory(fresh(0) * KvLayout::kBlockTokens);
  for (size_t part = 0; part < pools_.size(); ++part)
    for (Pool& pool = pools_[part]; fresh(part) > 0;)
      pool.free.push_back(pool.backend.allocate(pool.layout.block_bytes(), "the KV cache"));
  for (size_t part = 0; part < pools_.size(); ++part)
    for (int64_t n = lacking(part); n > 0; --n) {
      sequence.blocks[part].push_back(pools_[part].free.back());
      pools_[part].free.pop_back();
    }
}

void KvCache::keep_blocks(Sequence& sequence, int64_t n) {
  for (size_t part = 0; part < sequence.blocks.size(); ++part)
    while (int64_t(sequence.blocks[part].size()) > n) {
      pools_[part].free.push_back(sequence.blocks[part].back());
      sequence.blocks[part].pop_back();
    }
}

int KvCache::new_sequence(int n_tokens) {
  const auto it = std::find_if(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return !s.used; });
  const auto id = it - sequences_.begin();
  if (it == sequences_.end()) sequences_.emplace_back();
  reserve(sequences_[id], std::max(n_tokens, 0));
  sequences_[id].used = true;
  return static_cast<int>(id);
}

void KvCache::free_sequence(int id) {
  at(id);
  keep_blocks(sequences_[id], 0);
  sequences_[id] = {};
}

void KvCache::reserve(int id, int n_tokens) {
  at(id);
  reserve(sequences_[id], n_tokens);
}

void KvCache::truncate(int id, int n_tokens) {
  if (n_tokens < 0 || n_tokens > at(id).n_tokens)
    throw OptionError("truncate to " + std::to_string(n_tokens) + " tokens, expected 0 to " +
                      std::to_string(at(id).n_tokens));
  sequences_[id].n_tokens = n_tokens;
  keep_blocks(sequences_[id], KvLayout::blocks_for(n_tokens));
}

int KvCache::length(int id) const { return at(id).n_tokens; }

void KvCache::extend(int id, int n) {
  const int64_t length = int64_t{at(id).n_tokens} + n;
  reserve(sequences_[id], length);
  sequences_[id].n_tokens = static_cast<int>(length);
}

const std::vector<std::byte*>& KvCache::blocks(int id, size_t part) const { return at(id).blocks[part]; }

const KvCache::Sequence& KvCache::at(int id) const {
  if (id < 0 || size_t(id) >= sequences_.size() || !sequences_[id].used)
    throw OptionError("sequence " + std::to_string(id) + " does not exist");
  return sequences_[id];
}

}  // namespace vptq
