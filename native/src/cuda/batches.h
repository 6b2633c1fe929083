// The batches of one step in the GPU's memory, always at the same addresses: recorded kernels find the next step's
// there.
#pragma once

#include "cuda/kernels.h"
#include "cuda/memory.h"

namespace vptq::cuda {

class Batches {
 public:
  Batches(Memory& memory, int max_tokens);
  ~Batches();
  Batches(const Batches&) = delete;
  Batches& operator=(const Batches&) = delete;

  // `outputs` has the same sequences and blocks as `batch`. The step before is done.
  void upload(const Batch& batch, const Batch& outputs, Stream stream);
  // Where a batch that was given to upload() lies.
  const DeviceBatch& operator[](const Batch& batch) const;

  // Changes whenever something has got another address.
  int addresses() const { return addresses_; }

 private:
  // Arrays of max_tokens numbers: four for each batch, one for both.
  enum Array { kTokens, kPositions, kSequences, kOutputs, kPerBatch, kFirstBlock = 2 * kPerBatch, kArrays };

  void put(const Batch& batch, int slot);
  void reserve_blocks(size_t n);

  Memory& memory_;
  int max_tokens_;
  int32_t *host_, *device_;  // (kArrays, max_tokens); host_ pinned
  size_t max_blocks_ = 0;
  std::byte** device_blocks_ = nullptr;
  std::vector<std::byte*> blocks_;  // what lies there
  DeviceBatch slots_[2];
  const Batch* uploaded_[2] = {};
  int addresses_ = 0;
};

}  // namespace vptq::cuda
