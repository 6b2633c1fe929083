// Memory of the GPU that lives as long as the backend, and the way of the weights into it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cuda/runtime.h"

namespace vptq::cuda {

class Memory {
 public:
  explicit Memory(Stream stream) : stream_(stream) {}
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Aligned to 256 bytes. Throws OutOfMemoryError, which names `what`.
  std::byte* allocate(size_t bytes, const std::string& what);

  // Copies bytes of the host's, in chunks through pinned memory, one while the chunk before is on its way. They can be
  // changed when it returns.
  void send(std::byte* to, const std::byte* from, size_t bytes);
  // A copy of a file's bytes; the same one where they have been asked for before.
  const std::byte* upload(const std::byte* data, size_t bytes, const std::string& what);

 private:
  static constexpr size_t kChunk = size_t{8} << 20;  // bytes

  struct Staging {
    std::byte* data = nullptr;   // (kChunk), pinned
    cudaEvent_t sent = nullptr;  // when it can be written again
  };

  Stream stream_;
  std::vector<std::byte*> allocations_;
  std::byte* slab_ = nullptr;
  size_t left_ = 0;  // bytes of the slab
  Staging staging_[2];
  std::map<std::pair<const std::byte*, size_t>, const std::byte*> uploaded_;
};

}  // namespace vptq::cuda
