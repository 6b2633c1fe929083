#include "cuda_runtime_api.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "sanitizers.h"
#include "work.h"

using namespace vptq::cuda::emulation;

using Work = std::function<void()>;

struct CUstream_st {
  int device;
  std::deque<Work> pending;
  bool capturing = false, invalidated = false;
  cudaStreamCaptureMode mode{};
  std::thread::id capturer;
  std::vector<Work> recorded;
};
struct CUgraph_st {
  std::vector<Work> work;
};
struct CUgraphExec_st {
  std::shared_ptr<const std::vector<Work>> work;  // launched ones outlive it
};
struct CUevent_st {
  struct Moment {
    std::atomic<bool> reached = false;
    std::chrono::steady_clock::time_point time;
  };
  cudaStream_t stream = nullptr;
  std::shared_ptr<Moment> moment;  // of the last record
};

namespace {

constexpr size_t kDefaultMemory = size_t{4} << 30;

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;

struct Allocation {
  size_t bytes;
  int device;  // pinned memory's is kHost
};
constexpr int kHost = -1;
using Allocations = std::map<uintptr_t, Allocation>;  // by address

// Guarded by `mutex`: several OS threads may use several streams.
std::mutex mutex;
std::set<cudaStream_t> streams;
Allocations device_memory, pinned_memory;
std::map<int, int> n_running;  // by device: works

// Held while pending work runs, and not by who holds `mutex`: streams take turns.
std::mutex one_stream;

int device_count() {
  const char* text = std::getenv("VPTQ_EMULATED_DEVICES");
  return text ? std::atoi(text) : 1;
}

bool is_device(int device) { return device >= 0 && device < device_count(); }

size_t total_memory(int device) {
  const char* text = std::getenv("VPTQ_EMULATED_MEMORY");
  if (!text) return kDefaultMemory;
  for (; device > 0 && std::strchr(text, ','); --device) text = std::strchr(text, ',') + 1;
  return std::strtoull(text, nullptr, 10);
}

size_t allocated(int device) {
  size_t bytes = 0;
  for (const auto& [address, memory] : device_memory) bytes += memory.device == device ? memory.bytes : 0;
  return bytes;
}

bool holds(const Allocations& memory, const void* address, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  auto after = memory.upper_bound(start);
  if (after == memory.begin()) return false;
  const auto& [first, found] = *std::prev(after);
  return start - first <= found.bytes && bytes <= found.bytes - (start - first);
}

// What waits for the device, or may: not while a capture that forbids it is under way, which it ends.
bool forbidden_by_capture() {
  bool forbidden = false;
  for (cudaStream_t stream : streams) {
    if (!stream->capturing || stream->mode == cudaStreamCaptureModeRelaxed) continue;
    if (stream->mode == cudaStreamCaptureModeThreadLocal && stream->capturer != std::this_thread::get_id()) continue;
    forbidden = stream->invalidated = true;
  }
  return forbidden;
}

void forbid(uintptr_t memory, size_t bytes) { ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(memory), bytes); }
void permit(uintptr_t memory, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(memory), bytes); }

// A device's memory is there only while this is.
class Running {
 public:
  explicit Running(int device) : device_(device) {
    const std::lock_guard lock(mutex);
    if (n_running[device_]++ == 0) for_all(permit);
  }
  ~Running() {
    const std::lock_guard lock(mutex);
    if (--n_running[device_] == 0) for_all(forbid);
  }

 private:
  void for_all(void (*change)(uintptr_t, size_t)) const {
    for (const auto& [address, memory] : device_memory)
      if (memory.device == device_) change(address, memory.bytes);
  }

  int device_;
};

// Runs the stream's work, in order, until `enough`, or all of it. The caller holds `one_stream`.
void run_pending(cudaStream_t stream, const std::function<bool()>& enough = [] { return false; }) {
  const Running running(stream->device);
  while (!enough()) {
    Work work;
    {
      const std::lock_guard lock(mutex);
      if (stream->pending.empty()) return;
      work = std::move(stream->pending.front());
      stream->pending.pop_front();
    }
    work();
  }
}

// Gives the stream work to do, or to record.
cudaError_t submit(cudaStream_t stream, Work work) {
  if (stream) {
    const std::lock_guard lock(mutex);
    if (!streams.count(stream)) return cudaErrorInvalidValue;
    if (stream->device != current_device) return cudaErrorInvalidResourceHandle;  // CUDA lets copies through
    if (stream->invalidated) return cudaErrorStreamCaptureInvalidated;
    if (stream->capturing) {
      stream->recorded.push_back(std::move(work));
    } else {
      stream->pending.push_back(std::move(work));
    }
    return cudaSuccess;
  }
  {
    const std::lock_guard lock(mutex);
    if (forbidden_by_capture()) return cudaErrorStreamCaptureUnsupported;
  }
  const Running running(current_device);
  work();
  return cudaSuccess;
}

bool is_of_kind(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  return kind == cudaMemcpyDefault ||
         (holds(device_memory, to, bytes) == to_device && holds(device_memory, from, bytes) == from_device);
}

// Memory that a copy in the background can use.
bool lasts(const void* memory, size_t bytes) {
  return holds(device_memory, memory, bytes) || holds(pinned_memory, memory, bytes);
}

bool is_stream(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  return streams.count(stream) > 0;
}

// Whether one may wait.
cudaError_t check_wait() {
  const std::lock_guard lock(mutex);
  return forbidden_by_capture() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t allocate(void** memory, size_t bytes, Allocations& kind, int device) {
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  // Exactly as large as asked for, that AddressSanitizer sees what goes past it.
  if (posix_memalign(memory, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xff, bytes);
  kind[reinterpret_cast<uintptr_t>(*memory)] = {bytes, device};
  return cudaSuccess;
}

}  // namespace

namespace vptq::cuda::emulation {

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   std::function<void()> thread) {
  const cudaError_t error = check_launch(kernel.address, grid, block, shared_bytes);
  if (error != cudaSuccess) return result(error);
  if (is_named("VPTQ_EMULATED_FAILURE", kernel.source)) return result(cudaErrorInvalidConfiguration);
  const size_t n_left_out = is_named("VPTQ_EMULATED_FAULT", kernel.source) ? 1 : 0;
  return result(submit(stream, [=, thread = std::move(thread)] {
    run_grid(kernel.address, grid, block, shared_bytes, thread, n_left_out);
  }));
}

}  // namespace vptq::cuda::emulation

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "emulation");
  properties->major = capability() / 10;
  properties->minor = capability() % 10;
  properties->multiProcessorCount = 4;
  properties->totalGlobalMem = total_memory(device);
  properties->sharedMemPerBlock = kSharedBytes;
  properties->sharedMemPerBlockOptin = kSharedBytesOptIn;
  properties->l2CacheSize = 50 << 20;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const cudaError_t error = check_wait();
  if (error != cudaSuccess) return result(error);
  const std::lock_guard in_turn(one_stream);
  std::vector<cudaStream_t> all;
  {
    const std::lock_guard lock(mutex);
    all.assign(streams.begin(), streams.end());
  }
  for (cudaStream_t stream : all) run_pending(stream);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard lock(mutex);
  *total = total_memory(current_device);
  *free = *total - std::min(*total, allocated(current_device));
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const std::lock_guard lock(mutex);
  if (forbidden_by_capture()) return result(cudaErrorStreamCaptureUnsupported);
  const size_t total = total_memory(current_device), taken = allocated(current_device);
  *memory = nullptr;
  if (taken > total || bytes > total - taken) return result(cudaErrorMemoryAllocation);
  const cudaError_t error = allocate(memory, bytes, device_memory, current_device);
  if (*memory && n_running[current_device] == 0) forbid(reinterpret_cast<uintptr_t>(*memory), bytes);
  return result(error);
}

cudaError_t cudaFree(void* memory) {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess || !memory) return error;
  const std::lock_guard lock(mutex);
  const auto found = device_memory.find(reinterpret_cast<uintptr_t>(memory));
  if (found == device_memory.end()) return result(cudaErrorInvalidValue);
  permit(found->first, found->second.bytes);
  device_memory.erase(found);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  const std::lock_guard lock(mutex);
  if (forbidden_by_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return result(allocate(memory, bytes, pinned_memory, kHost));
}

cudaError_t cudaMallocHost(void** memory, size_t bytes) { return cudaHostAlloc(memory, bytes, cudaHostAllocDefault); }

cudaError_t cudaFreeHost(void* memory) {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess || !memory) return error;
  const std::lock_guard lock(mutex);
  if (!pinned_memory.erase(reinterpret_cast<uintptr_t>(memory))) return result(cudaErrorInvalidValue);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags != cudaStreamNonBlocking) return result(cudaErrorInvalidValue);
  const std::lock_guard lock(mutex);
  *stream = new CUstream_st{.device = current_device};
  streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (!is_stream(stream)) return result(cudaErrorInvalidValue);
  const std::lock_guard in_turn(one_stream);
  run_pending(stream);
  const std::lock_guard lock(mutex);
  streams.erase(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  {
    const std::lock_guard lock(mutex);
    if (stream && !streams.count(stream)) return result(cudaErrorInvalidValue);
    if (stream && stream->capturing) {
      stream->invalidated = true;
      return result(cudaErrorStreamCaptureUnsupported);
    }
    if (forbidden_by_capture()) return result(cudaErrorStreamCaptureUnsupported);
  }
  if (!stream) return cudaSuccess;
  const std::lock_guard in_turn(one_stream);
  run_pending(stream);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = check_wait();
  return error == cudaSuccess ? cudaMemcpyAsync(to, from, bytes, kind) : result(error);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  bool from_lasts, to_lasts;
  {
    const std::lock_guard lock(mutex);
    if (stream && !streams.count(stream)) return result(cudaErrorInvalidValue);
    if (!is_of_kind(to, from, bytes, kind)) return result(cudaErrorInvalidValue);
    from_lasts = lasts(from, bytes);
    to_lasts = lasts(to, bytes);
    if (stream && stream->capturing && !(from_lasts && to_lasts)) {
      stream->invalidated = true;
      return result(cudaErrorStreamCaptureUnsupported);
    }
  }
  // What is not pinned has been read, or written, when this returns.
  if (!from_lasts) {
    const auto* first = static_cast<const std::byte*>(from);
    const std::vector copy(first, first + bytes);
    return result(submit(stream, [=] { std::memcpy(to, copy.data(), bytes); }));
  }
  const cudaError_t error = submit(stream, [=] { std::memcpy(to, from, bytes); });
  if (error != cudaSuccess || to_lasts) return result(error);
  return cudaStreamSynchronize(stream);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  {
    const std::lock_guard lock(mutex);
    if (!holds(device_memory, to, bytes)) return result(cudaErrorInvalidValue);
  }
  return result(submit(stream, [=] { std::memset(to, value, bytes); }));
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const std::lock_guard lock(mutex);
  if (!stream) return result(cudaErrorStreamCaptureUnsupported);
  if (!streams.count(stream)) return result(cudaErrorInvalidValue);
  if (stream->capturing) return result(cudaErrorIllegalState);
  stream->capturing = true;
  stream->invalidated = false;
  stream->mode = mode;
  stream->capturer = std::this_thread::get_id();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const std::lock_guard lock(mutex);
  *graph = nullptr;
  if (!stream || !streams.count(stream)) return result(cudaErrorInvalidValue);
  if (!stream->capturing) return result(cudaErrorIllegalState);
  stream->capturing = false;
  std::vector<Work> recorded = std::exchange(stream->recorded, {});
  if (std::exchange(stream->invalidated, false)) return result(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st{std::move(recorded)};
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = nullptr;
  if (!graph) return result(cudaErrorInvalidValue);
  *exec = new CUgraphExec_st{std::make_shared<const std::vector<Work>>(graph->work)};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return result(cudaErrorInvalidValue);
  return result(submit(stream, [all = exec->work] {
    for (const Work& work : *all) work();
  }));
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  if (!exec) return result(cudaErrorInvalidValue);
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (!graph) return result(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream;
  event->moment = std::make_shared<CUevent_st::Moment>();
  return result(submit(stream, [moment = event->moment] {
    moment->time = std::chrono::steady_clock::now();
    moment->reached = true;
  }));
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const cudaError_t error = check_wait();
  if (error != cudaSuccess) return result(error);
  if (!event->moment) return cudaSuccess;
  const std::lock_guard in_turn(one_stream);
  if (!event->moment->reached) run_pending(event->stream, [&] { return event->moment->reached.load(); });
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  for (cudaEvent_t event : {start, end}) {
    if (!event->moment || !event->moment->reached) return result(cudaErrorInvalidValue);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->moment->time - start->moment->time).count();
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
