// The way of what TopLogits wants from the GPU to the host: some hundred bytes a sequence instead of all its logits.
#pragma once

#include "cuda/kernels.h"

namespace vptq::cuda {

class TopLogitsReader {
 public:
  TopLogitsReader() = default;
  ~TopLogitsReader();
  TopLogitsReader(const TopLogitsReader&) = delete;
  TopLogitsReader& operator=(const TopLogitsReader&) = delete;

  // Fills top.found from logits (n, n_vocab) in the GPU's memory; waits for the stream.
  void read(const float* logits, int n, TopLogits& top, Stream stream);

 private:
  void reserve(size_t host_bytes, size_t device_bytes);
  void free();

  // What is found, then the tokens; on the device the workspace behind them.
  std::byte *host_ = nullptr, *device_ = nullptr;  // host_ pinned
  size_t host_bytes_ = 0, device_bytes_ = 0;
};

}  // namespace vptq::cuda
