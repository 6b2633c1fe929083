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

using Work = std::function<void()>;

struct CUstream_st {
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

constexpr size_t kSharedBytes = 48 << 10, kSharedBytesOptIn = 227 << 10;
constexpr size_t kDefaultMemory = size_t{4} << 30;

thread_local cudaError_t last_error = cudaSuccess;

// Guarded by `mutex`: several OS threads may use several streams.
std::mutex mutex;
std::set<cudaStream_t> streams;
std::map<uintptr_t, size_t> device_memory, pinned_memory;  // address to bytes
size_t device_bytes = 0;
int n_running = 0;  // works
std::map<const void*, size_t> allowed_shared;

// Held while pending work runs, and not by who holds `mutex`: streams take turns.
std::mutex one_stream;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

size_t total_memory() {
  const char* text = std::getenv("VPTQ_EMULATED_MEMORY");
  return text ? std::strtoull(text, nullptr, 10) : kDefaultMemory;
}

bool holds(const std::map<uintptr_t, size_t>& memory, const void* address, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  auto after = memory.upper_bound(start);
  if (after == memory.begin()) return false;
  const auto& [first, size] = *std::prev(after);
  return start - first <= size && bytes <= size - (start - first);
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

// Device memory is there only while this is.
class Running {
 public:
  Running() {
    const std::lock_guard lock(mutex);
    if (n_running++ > 0) return;
    for (const auto& [memory, bytes] : device_memory) permit(memory, bytes);
  }
  ~Running() {
    const std::lock_guard lock(mutex);
    if (--n_running > 0) return;
    for (const auto& [memory, bytes] : device_memory) forbid(memory, bytes);
  }
};

// Runs the stream's work, in order, until `enough`, or all of it. The caller holds `one_stream`.
void run_pending(cudaStream_t stream, const std::function<bool()>& enough = [] { return false; }) {
  const Running running;
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
  const Running running;
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

cudaError_t allocate(void** memory, size_t bytes, std::map<uintptr_t, size_t>& kind) {
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  // Exactly as large as asked for, that AddressSanitizer sees what goes past it.
  if (posix_memalign(memory, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xff, bytes);
  kind[reinterpret_cast<uintptr_t>(*memory)] = bytes;
  return cudaSuccess;
}

}  // namespace

namespace vptq::cuda::emulation {

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   std::function<void()> thread) {
  const uint64_t n_threads = uint64_t{block.x} * block.y * block.z;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || n_threads < 1 || n_threads > 1024) {
    return result(cudaErrorInvalidConfiguration);
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return result(cudaErrorInvalidConfiguration);
  }
  {
    const std::lock_guard lock(mutex);
    const auto allowed = allowed_shared.find(kernel);
    if (shared_bytes > (allowed == allowed_shared.end() ? kSharedBytes : std::max(kSharedBytes, allowed->second))) {
      return result(cudaErrorInvalidValue);
    }
  }
  return result(
      submit(stream, [=, thread = std::move(thread)] { run_grid(kernel, grid, block, shared_bytes, thread); }));
}

}  // namespace vptq::cuda::emulation

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorIllegalState: return "cudaErrorIllegalState";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorIllegalState: return "the operation cannot be performed in the present state";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "emulation");
  properties->major = 9;
  properties->minor = 0;
  properties->multiProcessorCount = 4;
  properties->totalGlobalMem = total_memory();
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
  *total = total_memory();
  *free = *total - std::min(*total, device_bytes);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const std::lock_guard lock(mutex);
  if (forbidden_by_capture()) return result(cudaErrorStreamCaptureUnsupported);
  const size_t total = total_memory();
  *memory = nullptr;
  if (device_bytes > total || bytes > total - device_bytes) return result(cudaErrorMemoryAllocation);
  const cudaError_t error = allocate(memory, bytes, device_memory);
  if (*memory && n_running == 0) forbid(reinterpret_cast<uintptr_t>(*memory), bytes);
  if (error == cudaSuccess) device_bytes += bytes;
  return result(error);
}

cudaError_t cudaFree(void* memory) {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess || !memory) return error;
  const std::lock_guard lock(mutex);
  const auto found = device_memory.find(reinterpret_cast<uintptr_t>(memory));
  if (found == device_memory.end()) return result(cudaErrorInvalidValue);
  permit(found->first, found->second);
  device_bytes -= found->second;
  device_memory.erase(found);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  const std::lock_guard lock(mutex);
  if (forbidden_by_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return result(allocate(memory, bytes, pinned_memory));
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
  *stream = new CUstream_st;
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

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > kSharedBytesOptIn) {
    return result(cudaErrorInvalidValue);
  }
  const std::lock_guard lock(mutex);
  allowed_shared[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}
