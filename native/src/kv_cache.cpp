#include "kv_cache.h"

#include <algorithm>
#include <cstdio>

#include "vptq/error.h"

namespace vptq {
namespace {

int64_t blocks_for(int64_t n_tokens) { return (n_tokens + KvLayout::kBlockTokens - 1) / KvLayout::kBlockTokens; }

std::string gib(double bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GiB", bytes / (1 << 30));
  return text;
}

}  // namespace

size_t KvCache::bytes(int64_t n_tokens) const { return size_t(blocks_for(n_tokens)) * layout_.block_bytes(); }

void KvCache::check_memory(int64_t n_tokens, size_t weights) const {
  const double need = double(blocks_for(n_tokens)) * double(layout_.block_bytes()) + double(weights);
  const auto available = double(backend_.available_memory());
  if (need > available)
    throw OutOfMemoryError((weights ? "the model's weights of " + gib(double(weights)) + " and the KV cache for "
                                    : std::string("the KV cache for ")) +
                           std::to_string(n_tokens) + " tokens (option n_ctx) need" + (weights ? " " : "s ") +
                           gib(need) + ", " + gib(available) +
                           " are available; a smaller n_ctx, or kv_type q8_0, needs less");
}

void KvCache::reserve(Sequence& sequence, int64_t n_tokens) {
  if (n_tokens > n_ctx_)
    throw OptionError("a sequence of " + std::to_string(n_tokens) + " tokens, expected at most the context of " +
                      std::to_string(n_ctx_) + " (option n_ctx)");
  const int64_t lacking = blocks_for(n_tokens) - int64_t(sequence.blocks.size());
  const int64_t fresh = lacking - int64_t(free_blocks_.size());
  if (fresh > 0) {
    check_memory(fresh * KvLayout::kBlockTokens);
    for (int64_t i = 0; i < fresh; ++i)
      free_blocks_.push_back(backend_.allocate(layout_.block_bytes(), "the KV cache"));
  }
  for (int64_t i = 0; i < lacking; ++i) {
    sequence.blocks.push_back(free_blocks_.back());
    free_blocks_.pop_back();
  }
}

void KvCache::keep_blocks(Sequence& sequence, int64_t n) {
  while (int64_t(sequence.blocks.size()) > n) {
    free_blocks_.push_back(sequence.blocks.back());
    sequence.blocks.pop_back();
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
  keep_blocks(sequences_[id], blocks_for(n_tokens));
}

int KvCache::length(int id) const { return at(id).n_tokens; }

void KvCache::extend(int id, int n) {
  const int64_t length = int64_t{at(id).n_tokens} + n;
  reserve(sequences_[id], length);
  sequences_[id].n_tokens = static_cast<int>(length);
}

const std::vector<std::byte*>& KvCache::blocks(int id) const { return at(id).blocks; }

const KvCache::Sequence& KvCache::at(int id) const {
  if (id < 0 || size_t(id) >= sequences_.size() || !sequences_[id].used)
    throw OptionError("sequence " + std::to_string(id) + " does not exist");
  return sequences_[id];
}

}  // namespace vptq
