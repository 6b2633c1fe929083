// A step allocates nothing once there is memory for its sequences' blocks, and everything has been as large as it gets.
// Usage: test_allocations MODEL.gguf
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "vptq/context.h"

namespace {

std::atomic<long> allocations{0};

void* counted(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (!p) throw std::bad_alloc();
  return p;
}

constexpr std::size_t kAlignment = __STDCPP_DEFAULT_NEW_ALIGNMENT__;
constexpr int kContext = 400;  // tokens, at most what the model's positions allow

// How often n_sequences sequences, fed together, allocate in the last 100 steps of a second time, which finds the
// blocks of the first one. in_pieces: a layer at a time.
long allocations_of(const std::shared_ptr<const vptq::Model>& model, int n_sequences, const std::string& kv_type,
                    bool in_pieces) {
  vptq::Context context(model, {.device = "cpu", .n_ctx = kContext, .n_threads = 2, .kv_type = kv_type});
  std::vector<vptq::Sampler> samplers(n_sequences, vptq::Sampler({.repeat_penalty = 1.1f, .seed = 1}));
  std::vector<vptq::Sampler*> pointers;
  std::vector<int32_t> tokens(n_sequences, 1);
  std::vector<std::vector<int32_t>> next;
  std::vector<vptq::Feed> feeds;
  for (int s = 0; s < n_sequences; ++s) {
    pointers.push_back(&samplers[s]);
    feeds.push_back({.sequence = context.new_sequence(), .tokens = {&tokens[s], 1}, .sampler = &samplers[s]});
  }
  long before = 0;
  for (int step = 0; step < 2 * kContext; ++step) {
    if (step == kContext)
      for (const vptq::Feed& feed : feeds) context.truncate(feed.sequence, 0);
    if (step == 2 * kContext - 100) before = allocations;
    if (in_pieces) {
      context.begin(feeds);
      while (!context.advance(1)) continue;
    } else {
      context.forward(feeds);
    }
    context.sample(pointers, {}, next);
    for (int s = 0; s < n_sequences; ++s) tokens[s] = next[s][0];
  }
  return allocations - before;
}

}  // namespace

void* operator new(std::size_t bytes) { return counted(bytes, kAlignment); }
void* operator new[](std::size_t bytes) { return counted(bytes, kAlignment); }
void* operator new(std::size_t bytes, std::align_val_t a) { return counted(bytes, std::size_t(a)); }
void* operator new[](std::size_t bytes, std::align_val_t a) { return counted(bytes, std::size_t(a)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const auto model = std::make_shared<const vptq::Model>(argv[1]);
  const long at_load = allocations;
  bool failed = at_load == 0;  // the counter counts
  for (const char* kv_type : {"f16", "q8_0"})
    for (const int n_sequences : {1, 3})
      for (const bool in_pieces : {false, true}) {
        const long found = allocations_of(model, n_sequences, kv_type, in_pieces);
        std::printf("%s, sequences: %d%s: %ld allocations in 100 steps\n", kv_type, n_sequences,
                    in_pieces ? ", in pieces" : "", found);
        failed |= found != 0;
      }
  return failed;
}
