#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "sanitizers.h"

// void vptq_switch_stacks(void** from, void* to): leaves what a call keeps on this stack, notes its pointer in *from
// and takes up the stack whose pointer is `to`. (swapcontext() would ask the kernel twice for the signals' mask.)
#if defined(__x86_64__)
asm(R"(
.text
.globl vptq_switch_stacks
.hidden vptq_switch_stacks
.type vptq_switch_stacks, @function
vptq_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size vptq_switch_stacks, . - vptq_switch_stacks
)");
constexpr int kSavedWords = 6;  // before the address to return to
constexpr int kFrameWords = 8;  // and a word more: a function starts 8 bytes off a multiple of 16
#elif defined(__aarch64__)
asm(R"(
.text
.globl vptq_switch_stacks
.hidden vptq_switch_stacks
.type vptq_switch_stacks, %function
vptq_switch_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size vptq_switch_stacks, . - vptq_switch_stacks
)");
constexpr int kSavedWords = 11;
constexpr int kFrameWords = 20;
#else
#error "The emulation of CUDA has no stack switch for this processor."
#endif

extern "C" void vptq_switch_stacks(void** from, void* to);

namespace vptq::cuda::emulation {

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 64 << 10;  // below the stack: running over its end faults; a page of any size

thread_local Fiber* running = nullptr;
thread_local Fiber* left = nullptr;

}  // namespace

Fiber::Fiber() {
  if (races_are_sought()) accesses_ = __tsan_get_current_fiber();
}

Fiber::Fiber(void (*run)()) : run_(run) {
  if (races_are_sought()) accesses_ = __tsan_create_fiber(0);
  mapped_ = mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  char* bottom = static_cast<char*>(mapped_) + kGuardBytes;
  if (mprotect(bottom, kStackBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  bottom_ = bottom;
  bytes_ = kStackBytes;
  void** frame = reinterpret_cast<void**>(bottom + kStackBytes) - kFrameWords;
  frame[kSavedWords] = reinterpret_cast<void*>(&Fiber::start);
  stack_pointer_ = frame;
}

Fiber::~Fiber() {
  if (!mapped_) return;
  if (races_are_sought()) __tsan_destroy_fiber(accesses_);
  ASAN_UNPOISON_MEMORY_REGION(bottom_, bytes_);
  munmap(mapped_, kGuardBytes + kStackBytes);
}

void Fiber::set_name(const char* name) {
  if (races_are_sought()) __tsan_set_fiber_name(accesses_, name);
}

void Fiber::switch_to(Fiber& to) {
  left = this;
  running = &to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.bytes_);
#endif
  constexpr unsigned kNoSynchronization = 1;
  if (races_are_sought()) __tsan_switch_to_fiber(to.accesses_, kNoSynchronization);
  vptq_switch_stacks(&stack_pointer_, to.stack_pointer_);
  arrive();
}

// On this stack again, or for the first time.
void Fiber::arrive() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &left->bottom_, &left->bytes_);
#endif
}

void Fiber::start() {
  running->arrive();
  running->run_();
}

}  // namespace vptq::cuda::emulation
