// What the emulation tells the sanitizers, which do nothing with it where they are not.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#endif

// ThreadSanitizer finds the races of a kernel's threads: between two barriers, of each other's accesses to shared and
// global memory. It has to instrument the kernels and nothing of the emulation, whose sources ask at run time whether
// it is there.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_set_fiber_name(void* fiber, const char* name);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void __tsan_read_range_pc(void* address, unsigned long bytes, void* code);
[[gnu::weak]] void __tsan_write_range_pc(void* address, unsigned long bytes, void* code);
}

namespace vptq::cuda::emulation {

inline bool races_are_sought() { return __tsan_create_fiber != nullptr; }

// What a thread did before release(x) happened before what another does after a later acquire(x).
inline void release(void* address) {
  if (races_are_sought()) __tsan_release(address);
}
inline void acquire(void* address) {
  if (races_are_sought()) __tsan_acquire(address);
}

// Accesses that the emulation makes in a thread's name, for `code` of the kernel.
inline void note_read(const void* address, size_t bytes, void* code) {
  if (races_are_sought()) __tsan_read_range_pc(const_cast<void*>(address), bytes, code);
}
inline void note_write(void* address, size_t bytes, void* code) {
  if (races_are_sought()) __tsan_write_range_pc(address, bytes, code);
}

}  // namespace vptq::cuda::emulation
