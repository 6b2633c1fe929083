#include "cuda/copy_bandwidth.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

namespace vptq::cuda {
namespace {

constexpr size_t kBytes = size_t{1} << 30;  // far more than any L2 holds
constexpr int kCopies = 11;

struct Free {
  void operator()(void* memory) const { cudaFree(memory); }
};
using Buffer = std::unique_ptr<void, Free>;

struct Destroy {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroy>;

constexpr const char* kWhat = "measuring the memory's bandwidth";

Buffer buffer(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), kWhat);
  return Buffer(memory);
}

Event event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), kWhat);
  return Event(event);
}

}  // namespace

double copy_bandwidth(Stream stream, size_t max_bytes) {
  const size_t bytes = std::max<size_t>(std::min(kBytes, max_bytes), 1);
  const Buffer from = buffer(bytes), to = buffer(bytes);
  const Event begin = event(), end = event();
  check(cudaMemsetAsync(from.get(), 0x5a, bytes, stream), kWhat);  // zeros may go faster than data does
  std::vector<float> milliseconds;
  for (int i = -1; i < kCopies; ++i) {  // one to warm up
    check(cudaEventRecord(begin.get(), stream), kWhat);
    check(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, stream), kWhat);
    check(cudaEventRecord(end.get(), stream), kWhat);
    check(cudaEventSynchronize(end.get()), kWhat);
    float elapsed = 0;
    check(cudaEventElapsedTime(&elapsed, begin.get(), end.get()), kWhat);
    if (i >= 0) milliseconds.push_back(elapsed);
  }
  std::nth_element(milliseconds.begin(), milliseconds.begin() + kCopies / 2, milliseconds.end());
  return 2.0 * double(bytes) / (milliseconds[kCopies / 2] * 1e-3);
}

}  // namespace vptq::cuda
