#include "cuda/memory.h"

#include <algorithm>
#include <cstring>

#include "vptq/error.h"

namespace vptq::cuda {
namespace {

constexpr size_t kAlignment = 256;          // bytes
constexpr size_t kSlab = size_t{32} << 20;  // bytes that are asked for at a time: cudaMalloc is slow

}  // namespace

Memory::~Memory() {
  for (const Slab& slab : slabs_) cudaFree(slab.data);
  for (const Staging& s : staging_) {
    if (s.sent) cudaEventDestroy(s.sent);
    if (s.data) cudaFreeHost(s.data);
  }
}

std::byte* Memory::allocate(size_t bytes, const std::string& what) {
  const size_t whole = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  if (slabs_.empty() || slabs_.back().bytes - used_ < whole) {
    const size_t slab = std::max(whole, kSlab);
    void* data = nullptr;
    if (cudaMalloc(&data, slab) != cudaSuccess) {
      cudaGetLastError();
      throw OutOfMemoryError("no memory on the GPU for " + what + ": " + std::to_string(bytes) + " bytes");
    }
    slabs_.push_back({static_cast<std::byte*>(data), slab});
    used_ = 0;
  }
  std::byte* at = slabs_.back().data + used_;
  used_ += whole;
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
  const auto [known, fresh] = uploaded_.try_emplace({data, bytes}, nullptr);
  if (fresh) {
    std::byte* to = allocate(bytes, what);
    send(to, data, bytes);
    known->second = to;
  }
  return known->second;
}

}  // namespace vptq::cuda
