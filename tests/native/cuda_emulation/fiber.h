// Stacks that one OS thread switches between.
#pragma once

#include <cstddef>

namespace vptq::cuda::emulation {

class Fiber {
 public:
  Fiber();                        // the caller's own stack
  explicit Fiber(void (*run)());  // a new stack, on which run() starts at the first switch to it; it must not return
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void set_name(const char* name);  // for messages of ThreadSanitizer
  // Goes on with `to`; returns when somebody switches back.
  void switch_to(Fiber& to);

 private:
  static void start();
  void arrive();

  void (*run_)() = nullptr;
  void* mapped_ = nullptr;
  void* stack_pointer_ = nullptr;  // while another fiber runs
  // What the sanitizers want to know.
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
  void* accesses_ = nullptr;  // ThreadSanitizer's account of them
};

}  // namespace vptq::cuda::emulation
