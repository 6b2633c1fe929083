#include "context/kv_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vptq/error.h"

namespace vptq {
namespace {

constexpr int kBlockTokens = KvLayout::kBlockTokens;

// Room for n elements, so that push_back() throws nothing.
template <class T>
void grow(std::vector<T>& v, size_t n) {
  if (n > v.capacity()) v.reserve(std::max(n, 2 * v.capacity()));
}

// "12 blocks of 32 tokens"
std::string blocks_text(int64_t n) {
  return std::to_string(n) + (n == 1 ? " block of " : " blocks of ") + std::to_string(kBlockTokens) + " tokens";
}

}  // namespace

DType kv_type_of(const std::string& name, int head_dim) {
  if (name == "q8_0" && head_dim % kQ8Block != 0)
    throw OptionError("kv_type: found q8_0, expected f16 or f32: q8_0 takes " + std::to_string(kQ8Block) +
                      " elements together, which do not divide this model's head_dim of " + std::to_string(head_dim));
  for (const auto& [known, type] : {std::pair{"f16", DType::f16}, {"f32", DType::f32}, {"q8_0", DType::q8_0}})
    if (name == known) return type;
  throw OptionError("kv_type: found '" + name + "', expected f16, f32 or q8_0");
}

KvCache::KvCache(const std::vector<Part>& parts, int n_ctx, int64_t n_blocks) : n_ctx_(n_ctx) {
  for (const Part& part : parts) pools_.push_back({part, {}});
  allow(n_blocks);
}

void KvCache::allow(int64_t n_blocks) {
  n_blocks_ = most_blocks_ = std::min<int64_t>(n_blocks, std::numeric_limits<int32_t>::max());
}

int64_t KvCache::n_blocks() const {
  if (n_blocks_ == most_blocks_ || std::ranges::any_of(sequences_, &Sequence::used)) return n_blocks_;
  return n_that_fit();
}

std::string KvCache::lack(int64_t n_blocks) const {
  for (const Pool& pool : pools_) {
    const double need = double(n_blocks) * double(pool.layout.block_bytes());
    const auto available = double(pool.backend.available_memory());
    if (need > available)
      return "needs " + gib(need) + (pools_.size() > 1 ? " on " + pool.backend.description() : "") + ", " +
             gib(available) + " are available";
  }
  return "";
}

void KvCache::check_memory(int64_t n_tokens) const {
  const std::string lacking = lack(KvLayout::blocks_for(n_tokens));
  if (!lacking.empty())
    throw OutOfMemoryError("the KV cache for " + std::to_string(n_tokens) + " tokens (option n_ctx) " + lacking +
                           "; a smaller n_ctx, or kv_type q8_0, needs less");
}

// Blocks that have memory or would get some, of those that are allowed.
int64_t KvCache::n_that_fit() const {
  double n = double(most_blocks_);
  for (const Pool& pool : pools_) {
    const double more = std::floor(double(pool.backend.available_memory()) / double(pool.layout.block_bytes()));
    n = std::min(n, double(pool.memory.size()) + more);
  }
  return int64_t(n);
}

// Makes sure that n blocks can be taken, and later given back, without an error.
void KvCache::make_room(int64_t n) {
  if (n > n_free_blocks())
    throw OutOfMemoryError("the KV cache is full: found " + std::to_string(n_free_blocks()) + " free of " +
                           blocks_text(n_blocks()) + ", expected " + std::to_string(n) + " (option kv_tokens)");
  const int64_t fresh = n - int64_t(free_.size());
  if (fresh <= 0) return;
  const size_t n_wanted = blocks_.size() + size_t(fresh), n_there = n_with_memory();
  grow(blocks_, n_wanted);
  grow(free_, n_wanted);
  if (n_there >= n_wanted) return;
  const auto lacking = int64_t(n_wanted - n_there);
  if (const std::string what = lack(lacking); !what.empty()) {
    n_blocks_ = n_that_fit();  // and are not taken yet: others may want the memory, too
    throw OutOfMemoryError("no memory for more of the KV cache than " + blocks_text(n_blocks_) + ": " +
                           std::to_string(lacking) + " more than " + std::to_string(n_there) + " " + what);
  }
  try {
    for (Pool& pool : pools_) {
      grow(pool.memory, n_wanted);
      while (pool.memory.size() < n_wanted)
        pool.memory.push_back(pool.backend.allocate(pool.layout.block_bytes(), "the KV cache"));
    }
  } catch (const OutOfMemoryError&) {
    n_blocks_ = int64_t(n_with_memory());
    throw;
  }
}

size_t KvCache::n_with_memory() const {
  size_t n = pools_[0].memory.size();
  for (const Pool& pool : pools_) n = std::min(n, pool.memory.size());
  return n;
}

// The one that was freed last; else one that has never been used.
int32_t KvCache::take() {
  int32_t block;
  if (free_.empty()) {
    block = static_cast<int32_t>(blocks_.size());
    blocks_.emplace_back();
  } else {
    block = free_.back();
    free_.pop_back();
  }
  blocks_[block] = {.n_sequences = 1};
  return block;
}

void KvCache::drop(int32_t block) {
  --blocks_[block].n_sequences;
  free_if_unused(block);
}

void KvCache::free_if_unused(int32_t block) {
  if (blocks_[block].n_users() == 0) free_.push_back(block);
}

void KvCache::keep_blocks(Sequence& sequence, int64_t n) {
  while (int64_t(sequence.blocks.size()) > n) {
    drop(sequence.blocks.back());
    sequence.blocks.pop_back();
  }
}

int KvCache::new_sequence(std::span<const int32_t> prefix) {
  if (prefix.size() > size_t(n_ctx_ / kBlockTokens))
    throw OptionError("prefix: found " + blocks_text(int64_t(prefix.size())) + ", expected at most the context of " +
                      std::to_string(n_ctx_) + " tokens (option n_ctx)");
  for (const int32_t block : prefix) {
    check_in_use(block);
    if (blocks_[block].n_tokens < kBlockTokens)
      throw OptionError("prefix: found block " + std::to_string(block) + " with " +
                        std::to_string(blocks_[block].n_tokens) + " tokens, expected full ones of " +
                        std::to_string(kBlockTokens));
  }
  std::vector<int32_t> blocks(prefix.begin(), prefix.end());
  n_blocks_ = n_blocks();
  const auto it = std::find_if(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return !s.used; });
  const auto id = it - sequences_.begin();
  if (it == sequences_.end()) sequences_.emplace_back();
  Sequence& sequence = sequences_[id];
  sequence.used = true;
  sequence.n_tokens = static_cast<int>(prefix.size()) * kBlockTokens;
  sequence.blocks = std::move(blocks);
  for (const int32_t block : sequence.blocks) ++blocks_[block].n_sequences;
  return static_cast<int>(id);
}

void KvCache::free_sequence(int id) {
  Sequence& sequence = idle(id);
  keep_blocks(sequence, 0);
  sequence.used = false;
  sequence.n_tokens = 0;
}

void KvCache::truncate(int id, int n_tokens) {
  Sequence& sequence = idle(id);
  if (n_tokens < 0 || n_tokens > sequence.n_tokens)
    throw OptionError("truncate to " + std::to_string(n_tokens) + " tokens, expected 0 to " +
                      std::to_string(sequence.n_tokens));
  const int rest = n_tokens % kBlockTokens;
  if (rest != 0 && n_tokens < sequence.n_tokens) {
    const int32_t last = sequence.blocks[n_tokens / kBlockTokens];
    if (blocks_[last].n_users() > 1)
      throw OptionError("truncate to " + std::to_string(n_tokens) + " tokens, expected a multiple of " +
                        std::to_string(kBlockTokens) + ": others use block " + std::to_string(last) + ", too");
    blocks_[last].n_tokens = static_cast<int8_t>(rest);
  }
  sequence.n_tokens = n_tokens;
  keep_blocks(sequence, KvLayout::blocks_for(n_tokens));
}

int KvCache::length(int id) const { return at(id).n_tokens; }

std::span<const int32_t> KvCache::blocks(int id) const { return at(id).blocks; }

void KvCache::hold(std::span<const int32_t> blocks) {
  for (const int32_t block : blocks) check_in_use(block);
  for (const int32_t block : blocks) ++blocks_[block].n_holds;
}

void KvCache::release(std::span<const int32_t> blocks) {
  const auto is_held = [this](int32_t b) { return b >= 0 && size_t(b) < blocks_.size() && blocks_[b].n_holds > 0; };
  size_t n = 0;
  while (n < blocks.size() && is_held(blocks[n])) --blocks_[blocks[n++]].n_holds;  // one may stand there twice
  for (const int32_t block : blocks.first(n)) ++blocks_[block].n_holds;
  if (n < blocks.size()) throw OptionError("found block " + std::to_string(blocks[n]) + ", expected one that is held");
  for (const int32_t block : blocks) {
    --blocks_[block].n_holds;
    free_if_unused(block);
  }
}

void KvCache::reserve(int id, int n) {
  Sequence& sequence = idle(id);
  const int64_t length = int64_t{sequence.n_tokens} + n;
  if (length > n_ctx_)
    throw OptionError("a sequence of " + std::to_string(length) + " tokens, expected at most the context of " +
                      std::to_string(n_ctx_) + " (option n_ctx)");
  const int64_t lacking = KvLayout::blocks_for(length) - int64_t(sequence.blocks.size());
  make_room(lacking);
  if (lacking > 0) grow(sequence.blocks, sequence.blocks.size() + size_t(lacking));
  for (int64_t i = 0; i < lacking; ++i) sequence.blocks.push_back(take());
}

void KvCache::commit(int id, int n) {
  Sequence& sequence = sequences_[id];
  const int first = sequence.n_tokens / kBlockTokens;
  sequence.n_tokens += n;
  for (int i = first; i < int(sequence.blocks.size()); ++i)
    blocks_[sequence.blocks[i]].n_tokens =
        static_cast<int8_t>(std::min(sequence.n_tokens - i * kBlockTokens, kBlockTokens));
}

void KvCache::give_back(int id) { keep_blocks(sequences_[id], KvLayout::blocks_for(at(id).n_tokens)); }

void KvCache::set_busy(int id, bool busy) { sequences_[id].busy = busy; }

void KvCache::check_idle(int id) const {
  if (at(id).busy)
    throw OptionError("sequence " + std::to_string(id) + " is busy: its batch is under way (advance, abandon)");
}

void KvCache::append_memory(int id, size_t part, std::vector<std::byte*>& out) const {
  for (const int32_t block : at(id).blocks) out.push_back(pools_[part].memory[block]);
}

const KvCache::Sequence& KvCache::at(int id) const {
  if (id < 0 || size_t(id) >= sequences_.size() || !sequences_[id].used)
    throw OptionError("sequence " + std::to_string(id) + " does not exist");
  return sequences_[id];
}

KvCache::Sequence& KvCache::idle(int id) {
  check_idle(id);
  return sequences_[id];
}

void KvCache::check_in_use(int32_t block) const {
  if (block < 0 || size_t(block) >= blocks_.size() || blocks_[block].n_users() == 0)
    throw OptionError("found block " + std::to_string(block) + ", expected one that is in use");
}

}  // namespace vptq
