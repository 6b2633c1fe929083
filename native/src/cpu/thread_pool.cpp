#include "cpu/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <exception>
#include <string>

#include "vptq/error.h"

namespace vptq::cpu {
namespace {

// Some tens of microseconds: the gap between two loops of one step is shorter, that between two steps may not be.
constexpr int kSpins = 4000;

// Multiply-adds that are worth a chunk of their own, some microseconds: a loop with less is faster on one thread.
constexpr int64_t kChunkWork = 1 << 15;
constexpr int64_t kChunksPerThread = 4;  // so that a thread that was held up leaves its share to the others

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `value` is no longer `old`: spins for a moment, then sleeps.
template <class T>
void wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) : process_(::getpid()) {
  try {
    for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this] { work(); });
  } catch (const std::exception&) {  // std::system_error, std::bad_alloc
    const int found = size();
    stop();
    throw OutOfMemoryError("n_threads: found " + std::to_string(n_threads) + ", expected at most the " +
                           std::to_string(found) + " that the system gave");
  }
}

ThreadPool::~ThreadPool() {
  if (::getpid() == process_)
    stop();
  else  // a child by fork has none of the threads: they can neither be joined nor let go
    new std::vector<std::thread>(std::move(workers_));
}

void ThreadPool::stop() {
  stopping_ = true;
  loops_.fetch_add(1, std::memory_order_release);
  loops_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

// How many of n items make a chunk.
int64_t ThreadPool::chunk_of(int64_t n, int64_t work) const {
  const int64_t fair = (n + size() * kChunksPerThread - 1) / (size() * kChunksPerThread);
  return std::max(fair, (kChunkWork + work - 1) / work);
}

void ThreadPool::run(int64_t n, int64_t grain, Body body, const void* context) {
  if (workers_.empty() || n <= grain) {
    if (n > 0) body(context, 0, n);
    return;
  }
  body_ = body;
  context_ = context;
  n_ = n;
  grain_ = grain;
  n_chunks_ = static_cast<uint32_t>((n + grain - 1) / grain);
  done_.store(0, std::memory_order_relaxed);
  const uint64_t loop = tickets_.load(std::memory_order_relaxed) >> 32;
  tickets_.store((loop + 1) << 32 | n_chunks_, std::memory_order_release);
  loops_.fetch_add(1, std::memory_order_release);
  loops_.notify_all();
  take_chunks();
  // A worker that has not come yet is not waited for: on a busy machine it may have no processor for a while.
  for (uint32_t done; (done = done_.load(std::memory_order_acquire)) != n_chunks_;) wait_while(done_, done);
}

void ThreadPool::work() {
  for (uint32_t seen = 0; !stopping_;) {
    wait_while(loops_, seen);
    seen = loops_.load(std::memory_order_acquire);
    take_chunks();
  }
}

void ThreadPool::take_chunks() {
  uint64_t tickets = tickets_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(tickets) != 0) {
    if (!tickets_.compare_exchange_weak(tickets, tickets - 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    const int64_t begin = (n_chunks_ - static_cast<uint32_t>(tickets)) * grain_;
    body_(context_, begin, std::min(begin + grain_, n_));
    // The loop may be over, and everything above another one's, as soon as this is counted.
    const uint32_t n_chunks = n_chunks_;
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_chunks) done_.notify_all();
    tickets = tickets_.load(std::memory_order_acquire);
  }
}

}  // namespace vptq::cpu
