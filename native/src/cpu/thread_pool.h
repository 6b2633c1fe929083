// Threads that share the chunks of one loop at a time.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace vptq::cpu {

class ThreadPool {
 public:
  // The caller of parallel_for is one of the threads. Throws OutOfMemoryError where the system has not so many.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(begin, end) over [0, n) in chunks, on all threads; returns when all are done. f must not throw. `work`, at
  // least 1, is the multiply-adds of one item: a loop with too few for two threads runs on the caller's.
  template <class F>
  void parallel_for(int64_t n, int64_t work, const F& f) {
    run(
        n, chunk_of(n, work),
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
  }

 private:
  using Body = void (*)(const void* context, int64_t begin, int64_t end);

  int64_t chunk_of(int64_t n, int64_t work) const;
  void run(int64_t n, int64_t grain, Body body, const void* context);
  void work();
  void take_chunks();
  void stop();

  // The loop at hand. Whoever holds a chunk may read these: they change only when all chunks are done.
  Body body_ = nullptr;
  const void* context_ = nullptr;
  int64_t n_ = 0, grain_ = 1;
  uint32_t n_chunks_ = 0;

  // Loops so far << 32 | chunks of this one that nobody has taken. A worker that wakes late, for which nobody waits,
  // can take a chunk of the loop that is there now, never one of a loop that is over.
  alignas(64) std::atomic<uint64_t> tickets_{0};
  alignas(64) std::atomic<uint32_t> done_{0};   // chunks of this loop
  alignas(64) std::atomic<uint32_t> loops_{0};  // what idle workers sleep on
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
  const pid_t process_;  // that has the workers
};

}  // namespace vptq::cpu
