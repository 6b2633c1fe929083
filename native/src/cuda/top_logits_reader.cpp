#include "cuda/top_logits_reader.h"

#include <algorithm>

namespace vptq::cuda {

TopLogitsReader::~TopLogitsReader() { free(); }

void TopLogitsReader::read(const float* logits, int n, TopLogits& top, Stream stream) {
  const size_t found_bytes = size_t(n) * top.row_size() * sizeof(Candidate);
  const size_t host_bytes = found_bytes + (size_t(n) * top.n_tokens + 1) / 2 * 2 * sizeof(int32_t);
  const size_t workspace = size_t(n) * top_logits_parts(top.n_vocab) * top.n_largest;
  reserve(host_bytes, host_bytes + workspace * sizeof(Candidate));

  std::copy(top.tokens.begin(), top.tokens.end(), reinterpret_cast<int32_t*>(host_ + found_bytes));
  if (top.n_tokens)
    check(cudaMemcpyAsync(device_ + found_bytes, host_ + found_bytes, top.tokens.size() * sizeof(int32_t),
                          cudaMemcpyHostToDevice, stream),
          "sending tokens");
  top_logits(logits, n, top.n_vocab, top.n_largest, reinterpret_cast<const int32_t*>(device_ + found_bytes),
             top.n_tokens, reinterpret_cast<Candidate*>(device_), reinterpret_cast<Candidate*>(device_ + host_bytes),
             stream);
  check(cudaMemcpyAsync(host_, device_, found_bytes, cudaMemcpyDeviceToHost, stream), "reading the largest logits");
  check(cudaStreamSynchronize(stream), "running a step");
  const auto* found = reinterpret_cast<const Candidate*>(host_);
  top.found.assign(found, found + found_bytes / sizeof(Candidate));
}

// The step before is done: nothing uses the memory. It grows by half at least, as with each step more may be wanted.
void TopLogitsReader::reserve(size_t host_bytes, size_t device_bytes) {
  const auto grown = [](size_t wanted, size_t before) {
    return wanted > before ? std::max(wanted, before + before / 2) : before;
  };
  if (host_bytes <= host_bytes_ && device_bytes <= device_bytes_) return;
  host_bytes = grown(host_bytes, host_bytes_);
  device_bytes = grown(device_bytes, device_bytes_);
  free();
  void *host = nullptr, *device = nullptr;
  check(cudaMallocHost(&host, host_bytes), "allocating pinned memory");
  host_ = static_cast<std::byte*>(host);
  check(cudaMalloc(&device, device_bytes), "allocating memory for the largest logits");
  device_ = static_cast<std::byte*>(device);
  host_bytes_ = host_bytes;
  device_bytes_ = device_bytes;
}

void TopLogitsReader::free() {
  if (host_) cudaFreeHost(host_);
  if (device_) cudaFree(device_);
  host_ = device_ = nullptr;
  host_bytes_ = device_bytes_ = 0;
}

}  // namespace vptq::cuda
