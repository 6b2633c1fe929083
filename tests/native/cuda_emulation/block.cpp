#include "block.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "sanitizers.h"

namespace vptq::cuda::emulation {

uint3 thread_index, block_index;
dim3 block_shape, grid_shape;

namespace {

constexpr int kMaxThreads = 1024;

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  uint3 index;
  Fiber* fiber;           // on whose stack it stands while it waits; null before it starts
  const char* waits_for;  // an operation; null while it can run
  bool returned;
  unsigned exchanges;              // so many behind it
  std::vector<Copy> copies;        // not waited for
  std::vector<size_t> group_ends;  // of the committed ones, in copies
};

struct Warp {
  uint32_t lanes, ready, arrived;  // bits of lanes
  const char* operation;           // of those that have arrived
  // By exchanges' parity: a lane that goes on from one cannot get past the next one while others read this one's.
  alignas(16) std::byte deposits[2][kLanes][kDepositBytes];
};

// The block that runs, and its launch. One launch runs at a time: kernels' static shared memory is there once.
struct Machine {
  const void* kernel;
  const std::function<void()>* thread;
  bool backward;  // of threads that can run, the last one does
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
  uint32_t ready_warps;  // bits of warps with ready lanes
  int n_threads, n_returned, n_at_barrier;
  unsigned n_barriers;  // that have opened
  Thread* current;
  Fiber* host;
  Fiber* running;
  std::vector<Fiber*>* idle;
  std::vector<std::unique_ptr<Fiber>>* fibers;
  std::byte* shared;
  // For acquire() and release(): a block's start and end, and its barriers by parity, as deposits.
  char block_start, block_end, barriers[2];
};

Machine m;
std::mutex one_launch;

int number(const Thread& thread) { return static_cast<int>(&thread - m.threads); }
Warp& warp_of(const Thread& thread) { return m.warps[number(thread) / kLanes]; }

// A kernel's name where the program's symbols have it, else where to look it up.
std::string kernel_name() {
  Dl_info info{};
  if (!dladdr(m.kernel, &info)) return "unknown";
  if (info.dli_sname && info.dli_saddr == m.kernel) {
    int status = 0;
    const std::unique_ptr<char, decltype(&std::free)> name(
        abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), &std::free);
    return status == 0 ? name.get() : info.dli_sname;
  }
  char text[32];
  std::snprintf(text, sizeof(text), " %#zx",
                static_cast<size_t>(static_cast<const char*>(m.kernel) - static_cast<const char*>(info.dli_fbase)));
  return std::string("addr2line -Cfe ") + info.dli_fname + text;
}

std::string describe(const Thread& thread) {
  if (thread.returned) return "returned";
  if (!thread.waits_for) return "can run";
  return std::string("wait in ") + thread.waits_for;
}

// What the block's threads do, neighbours that do the same in one line.
void print_threads() {
  for (int first = 0; first < m.n_threads;) {
    int end = first + 1;
    const std::string what = describe(m.threads[first]);
    while (end < m.n_threads && describe(m.threads[end]) == what) ++end;
    std::fprintf(stderr, "  threads %d to %d: %s\n", first, end - 1, what.c_str());
    first = end;
  }
}

void print_place() {
  std::fprintf(stderr, "  kernel: %s\n  block (%u, %u, %u) of (%u, %u, %u), of (%u, %u, %u) threads, run %s\n",
               kernel_name().c_str(), block_index.x, block_index.y, block_index.z, grid_shape.x, grid_shape.y,
               grid_shape.z, block_shape.x, block_shape.y, block_shape.z, m.backward ? "backward" : "forward");
}

[[noreturn]] void deadlock() {
  std::fprintf(stderr, "CUDA emulation: no thread of the block can go on\n");
  print_place();
  print_threads();
  std::abort();
}

void set_ready(int warp, uint32_t lanes) {
  m.warps[warp].ready |= lanes;
  if (lanes) m.ready_warps |= 1u << warp;
}

// Takes the thread that runs next from those that can; null if none can.
Thread* next_thread() {
  if (!m.ready_warps) return nullptr;
  const int w = m.backward ? 31 - std::countl_zero(m.ready_warps) : std::countr_zero(m.ready_warps);
  Warp& warp = m.warps[w];
  const int lane = m.backward ? 31 - std::countl_zero(warp.ready) : std::countr_zero(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) m.ready_warps &= ~(1u << w);
  return &m.threads[w * kLanes + lane];
}

void make_current(Thread& thread) {
  m.current = &thread;
  thread_index = thread.index;
}

void switch_to(Fiber& fiber) {
  Fiber& self = *m.running;
  m.running = &fiber;
  self.switch_to(fiber);
}

void run_threads();

Fiber& idle_fiber() {
  if (m.idle->empty()) {
    m.fibers->push_back(std::make_unique<Fiber>(run_threads));
    return *m.fibers->back();
  }
  Fiber& fiber = *m.idle->back();
  m.idle->pop_back();
  return fiber;
}

void open_barrier_if_all_are_there() {
  if (m.n_at_barrier == 0 || m.n_at_barrier < m.n_threads - m.n_returned) return;
  m.n_at_barrier = 0;
  ++m.n_barriers;
  for (int i = 0; i < m.n_threads; ++i) {
    Thread& thread = m.threads[i];
    if (thread.returned) continue;
    thread.waits_for = nullptr;
    set_ready(i / kLanes, 1u << i % kLanes);
  }
}

// Lets others run until the current thread, which waits, can go on.
void wait() {
  Thread& self = *m.current;
  self.fiber = m.running;
  Thread* next = next_thread();
  if (!next) deadlock();
  if (next != &self) {
    make_current(*next);
    switch_to(next->fiber ? *next->fiber : idle_fiber());
    make_current(self);
  }
}

// What a fiber does: runs the current thread, then others that have not started, until one that waits on another fiber
// is to go on, or the block is done. Whoever switches back here has a new thread to start. Where races are sought, each
// of the block's threads has a fiber of its own.
void run_threads() {
  for (;;) {
    if (races_are_sought()) {
      char name[64];
      std::snprintf(name, sizeof(name), "thread (%u, %u, %u)", thread_index.x, thread_index.y, thread_index.z);
      m.running->set_name(name);
    }
    acquire(&m.block_start);
    (*m.thread)();
    release(&m.block_end);
    m.current->returned = true;
    ++m.n_returned;
    open_barrier_if_all_are_there();
    Thread* next = next_thread();
    if (!next && m.n_returned < m.n_threads) deadlock();
    if (next) make_current(*next);
    if (!races_are_sought()) {
      if (next && !next->fiber) continue;
      m.idle->push_back(m.running);
    }
    if (!next) {
      switch_to(*m.host);
    } else {
      switch_to(next->fiber ? *next->fiber : idle_fiber());
    }
  }
}

void run_block() {
  m.n_returned = m.n_at_barrier = 0;
  for (int i = 0; i < m.n_threads; ++i) {
    Thread& thread = m.threads[i];
    thread.fiber = nullptr;
    thread.waits_for = nullptr;
    thread.returned = false;
    thread.exchanges = 0;
    thread.copies.clear();
    thread.group_ends.clear();
  }
  for (int first = 0; first < m.n_threads; first += kLanes) {
    const int n_lanes = std::min(kLanes, m.n_threads - first);
    Warp& warp = m.warps[first / kLanes];
    warp.lanes = n_lanes == kLanes ? ~0u : (1u << n_lanes) - 1;
    warp.ready = warp.arrived = 0;
    set_ready(first / kLanes, warp.lanes);
  }
  if (races_are_sought()) {
    m.idle->clear();
    for (const auto& fiber : *m.fibers) m.idle->push_back(fiber.get());
  }
  release(&m.block_start);
  make_current(*next_thread());
  switch_to(idle_fiber());
  acquire(&m.block_end);
}

// Which way the launch runs: VPTQ_EMULATED_ORDER is forward, backward or, by default, alternate.
bool runs_backward() {
  static unsigned n_launches = 0;
  const char* order = std::getenv("VPTQ_EMULATED_ORDER");
  if (order && std::strcmp(order, "forward") == 0) return false;
  if (order && std::strcmp(order, "backward") == 0) return true;
  return n_launches++ % 2 == 1;
}

}  // namespace

void run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread,
              size_t n_left_out) {
  // Fibers stay on the OS thread that made them.
  static thread_local std::vector<std::unique_ptr<Fiber>> fibers;
  static thread_local std::vector<Fiber*> idle;
  const std::lock_guard lock(one_launch);
  fibers.reserve(kMaxThreads);  // threads that look for an idle one shall not be seen to free what others wrote
  idle.reserve(kMaxThreads);
  Fiber host;
  m.kernel = kernel;
  m.thread = &thread;
  m.backward = runs_backward();
  m.host = m.running = &host;
  m.fibers = &fibers;
  m.idle = &idle;
  m.n_threads = static_cast<int>(block.x * block.y * block.z);
  block_shape = block;
  grid_shape = grid;
  for (int i = 0; i < m.n_threads; ++i) {
    const auto n = static_cast<unsigned>(i);
    m.threads[i].index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
  }
  // Exactly as large as asked for, that AddressSanitizer sees what goes past it.
  void* shared = nullptr;
  if (shared_bytes && posix_memalign(&shared, 128, shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> owner(shared, &std::free);
  m.shared = static_cast<std::byte*>(shared);

  const size_t n_blocks = size_t{grid.x} * grid.y * grid.z - n_left_out;
  for (size_t i = 0; i < n_blocks; ++i) {
    const size_t b = m.backward ? n_blocks - 1 - i : i;
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    if (shared) std::memset(shared, 0xff, shared_bytes);
    run_block();
  }
}

std::byte* dynamic_shared() { return m.shared; }

void sync_block() {
  m.current->waits_for = "sync_block";
  ++m.n_at_barrier;
  char* barrier = &m.barriers[m.n_barriers % 2];
  release(barrier);
  open_barrier_if_all_are_there();
  wait();
  acquire(barrier);
}

const std::byte* exchange(const char* operation, const void* own, size_t bytes, void (*combine)(std::byte*)) {
  Thread& self = *m.current;
  Warp& warp = warp_of(self);
  if (~warp.lanes) fail("an operation of whole warps in a warp of fewer lanes");
  if (warp.arrived && std::strcmp(warp.operation, operation) != 0) {
    fail((std::string("a lane in ") + operation + " while others of its warp wait in " + warp.operation).c_str());
  }
  auto& deposits = warp.deposits[self.exchanges++ % 2];
  // Not by memcpy(), which would be noted as a write.
  for (size_t i = 0; i < bytes; ++i) {
    *static_cast<volatile std::byte*>(&deposits[lane()][i]) = static_cast<const std::byte*>(own)[i];
  }
  warp.operation = self.waits_for = operation;
  warp.arrived |= 1u << lane();
  if (!~warp.arrived) {
    warp.arrived = 0;
    if (combine) combine(deposits[0]);
    Thread* lanes = &m.threads[number(self) / kLanes * kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l].waits_for = nullptr;
    set_ready(number(self) / kLanes, ~0u);
  }
  wait();
  return deposits[0];
}

void sync_warp() {
  Thread& self = *m.current;
  std::byte* place = warp_of(self).deposits[self.exchanges % 2][0];
  release(place);
  exchange("sync_warp", nullptr, 0);
  acquire(place);
}

int lane() { return number(*m.current) % kLanes; }

void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
    fail("copy_async of what is not aligned to 16 bytes");
  }
  note_write(to, 16, __builtin_return_address(0));
  std::memset(to, 0xff, 16);
  m.current->copies.push_back({to, from});
}

void commit_copies() { m.current->group_ends.push_back(m.current->copies.size()); }

void wait_copies(size_t but) {
  Thread& self = *m.current;
  if (self.group_ends.size() <= but) return;
  const auto n_groups = static_cast<ptrdiff_t>(self.group_ends.size() - but);
  const size_t n_copies = self.group_ends[static_cast<size_t>(n_groups - 1)];
  for (size_t i = 0; i < n_copies; ++i) {
    const auto [to, from] = self.copies[i];
    note_read(from, 16, __builtin_return_address(0));
    note_write(to, 16, __builtin_return_address(0));
    std::memcpy(to, from, 16);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(n_copies));
  self.group_ends.erase(self.group_ends.begin(), self.group_ends.begin() + n_groups);
  for (size_t& end : self.group_ends) end -= n_copies;
}

void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n  thread (%u, %u, %u)\n", what, thread_index.x, thread_index.y,
               thread_index.z);
  print_place();
  print_threads();
  std::abort();
}

}  // namespace vptq::cuda::emulation
