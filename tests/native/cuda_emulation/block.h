// A kernel's threads on the host. Blocks run one after another. A block's threads take turns on one OS thread: each
// runs until it waits for others. Of those that can run, the first does, or the last: launches take turns, so that
// results change where a kernel relies on an order that nothing guarantees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "vector_types.h"

namespace vptq::cuda::emulation {

inline constexpr int kLanes = 32;

// What kernels call the same; they are of the thread that runs.
extern uint3 thread_index, block_index;
extern dim3 block_shape, grid_shape;

// Runs `thread` for all threads of the grid, but for its last blocks. `kernel` is its address, for messages. A block of
// whose threads none can go on, or that breaks a rule, ends the process with a message.
void run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread,
              size_t n_left_out);

// For the thread that runs:

std::byte* dynamic_shared();
// Waits for all threads of the block that have not returned.
void sync_block();
// Waits for the warp's 32 lanes to come here, each with `bytes` bytes of its own (at most kDepositBytes), all for the
// same `operation`. Lane l's are at [l * kDepositBytes] of what is returned, until the lane's next exchange. When all
// are there, `combine` may put something else in their place.
inline constexpr size_t kDepositBytes = 32;
const std::byte* exchange(const char* operation, const void* own, size_t bytes,
                          void (*combine)(std::byte* deposits) = nullptr);
void sync_warp();  // an exchange of nothing; alone among exchanges, it orders accesses to memory
int lane();
// A copy of 16 bytes that becomes visible when it is waited for. Until then its place holds 0xff.
void copy_async(void* to, const void* from);
void commit_copies();
void wait_copies(size_t but);  // for all groups but the last ones

[[noreturn]] void fail(const char* what);  // with where the running thread is

}  // namespace vptq::cuda::emulation
