#include "cuda/memory.h"

#include <algorithm>
#include <cstring>

#include "vptq/error.h"

namespace vptq::cuda {
namespace {

constexpr size_t kAlignment = 256;          // bytes
constexpr size_t kSlab = size_t{16} << 20;  // bytes that small ones share: cudaMalloc is slow, and rounds up to 2 MiB
#if defined(VPTQ_CUDA_EMULATION)            // so that AddressSanitizer sees what is read behind any of them
constexpr size_t kLarge = 0;
#else
constexpr size_t kLarge = size_t{2} << 20;  // bytes; a codebook of 65536 vectors of 8 has 1 MiB
#endif

std::byte* allocated(size_t bytes, const std::string& what) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw OutOfMemoryError("no memory on the GPU for " + what + ": " + std::to_string(bytes) + " bytes");
  }
  check(error, "allocating memory");
  return static_cast<std::byte*>(data);
}

}  // namespace

Memory::~Memory() {
  for (std::byte* data : allocations_) cudaFree(data);
  for (const Staging& s : staging_) {
    if (s.sent) cudaEventDestroy(s.sent);
    if (s.data) cudaFreeHost(s.data);
  }
}

std::byte* Memory::allocate(size_t bytes, const std::string& what) {
  if (bytes >= kLarge) {
    allocations_.push_back(allocated(std::max<size_t>(bytes, 1), what));
    return allocations_.back();
  }
  const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (left_ < whole) {
    allocations_.push_back(slab_ = allocated(kSlab, what));
    left_ = kSlab;
  }
  std::byte* at = slab_ + (kSlab - left_);
  left_ -= whole;
  return at;
}

void Memory::send(std::byte* to, const std::byte* from, size_t bytes) {
  for (size_t at = 0, i = 0; at < bytes; at += kChunk, ++i) {
    Staging& s = staging_[i % 2];
    if (!s.data) {
      void* pinned = nullptr;
      check(cudaMallocHost(&pinned, kChunk), "allocating pinned memory");
      s.data = static_cast<std::byte*>(pinned);
      check(cudaEventCreateWithFlags(&s.sent, cudaEventDisableTiming), "creating an event");
    } else {
      check(cudaEventSynchronize(s.sent), "sending weights");
    }
    const size_t n = std::min(kChunk, bytes - at);
    std::memcpy(s.data, from + at, n);
    check(cudaMemcpyAsync(to + at, s.data, n, cudaMemcpyHostToDevice, stream_), "sending weights");
    check(cudaEventRecord(s.sent, stream_), "sending weights");
  }
}

const std::byte* Memory::upload(const std::byte* data, size_t bytes, const std::string& what) {
  if (const auto known = uploaded_.find({data, bytes}); known != uploaded_.end()) return known->second;
  std::byte* to = allocate(bytes, what);
  send(to, data, bytes);
  uploaded_.emplace(std::pair{data, bytes}, to);
  return to;
}

}  // namespace vptq::cuda
