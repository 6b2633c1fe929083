#include "cuda/batches.h"

#include <algorithm>
#include <stdexcept>

namespace vptq::cuda {

Batches::Batches(Memory& memory, int max_tokens) : memory_(memory), max_tokens_(max_tokens) {
  const size_t bytes = size_t{kArrays} * max_tokens * sizeof(int32_t);
  void* pinned = nullptr;
  check(cudaMallocHost(&pinned, bytes), "allocating pinned memory");
  host_ = static_cast<int32_t*>(pinned);
  std::fill_n(host_, size_t{kArrays} * max_tokens, 0);
  device_ = reinterpret_cast<int32_t*>(memory.allocate(bytes, "the batch"));
}

Batches::~Batches() { cudaFreeHost(host_); }

void Batches::upload(const Batch& batch, const Batch& outputs, Stream stream) {
  put(batch, 0);
  put(outputs, 1);
  std::copy(batch.first_block.begin(), batch.first_block.end(), host_ + kFirstBlock * max_tokens_);
  check(
      cudaMemcpyAsync(device_, host_, size_t{kArrays} * max_tokens_ * sizeof(int32_t), cudaMemcpyHostToDevice, stream),
      "sending a batch");
  if (blocks_ != batch.blocks) {
    reserve_blocks(batch.blocks.size());
    blocks_ = batch.blocks;
    check(cudaMemcpyAsync(device_blocks_, blocks_.data(), blocks_.size() * sizeof(std::byte*), cudaMemcpyHostToDevice,
                          stream),
          "sending a batch");
  }
  for (DeviceBatch& slot : slots_) slot.blocks = device_blocks_;
}

const DeviceBatch& Batches::operator[](const Batch& batch) const {
  for (int i = 0; i < 2; ++i)
    if (uploaded_[i] == &batch) return slots_[i];
  throw std::logic_error("an operation on a batch that was not sent");
}

void Batches::put(const Batch& batch, int slot) {
  const auto array = [&](int which, const std::vector<int32_t>& values) -> const int32_t* {
    const int at = (slot * kPerBatch + which) * max_tokens_;
    std::copy(values.begin(), values.end(), host_ + at);
    return device_ + at;
  };
  uploaded_[slot] = &batch;
  slots_[slot] = {
      .tokens = array(kTokens, batch.tokens),
      .positions = array(kPositions, batch.positions),
      .sequences = array(kSequences, batch.sequences),
      .first_block = device_ + kFirstBlock * max_tokens_,
      .blocks = device_blocks_,
      .outputs = array(kOutputs, batch.outputs),
      .n = batch.n(),
      .n_prompt = batch.n_prompt,
      .n_outputs = static_cast<int>(batch.outputs.size()),
  };
}

void Batches::reserve_blocks(size_t n) {
  if (n <= max_blocks_) return;
  const size_t most = std::max(n, 2 * max_blocks_);
  device_blocks_ = reinterpret_cast<std::byte**>(memory_.allocate(most * sizeof(std::byte*), "the batch"));
  max_blocks_ = most;
  blocks_.clear();  // nothing lies there yet
  ++addresses_;
}

}  // namespace vptq::cuda
