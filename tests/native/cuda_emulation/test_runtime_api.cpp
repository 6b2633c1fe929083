// The emulation's host side: what the backend takes for granted of the CUDA runtime.
#include <exception>
#include <thread>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "testing.h"

using namespace vptq::cuda;

namespace {

__global__ void scale(const float* x, float factor, float* y) { y[threadIdx.x] = factor * x[threadIdx.x]; }

void test_graphs() {
  cudaStream_t stream;
  EXPECT(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  Device<float> x(std::vector<float>(8, 1.0f)), y(std::vector<float>(8, 0.0f));
  float* pinned = nullptr;
  EXPECT(cudaMallocHost(reinterpret_cast<void**>(&pinned), 8 * sizeof(float)) == cudaSuccess);
  EXPECT(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  float factor = 3;
  launch(scale, {1, 8}, stream, x.get(), factor, y.get());
  factor = 5;
  EXPECT(cudaMemcpyAsync(pinned, y.get(), 8 * sizeof(float), cudaMemcpyDeviceToHost, stream) == cudaSuccess);
  EXPECT(cudaMemsetAsync(y.get(), 0, sizeof(float), stream) == cudaSuccess);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  EXPECT(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  EXPECT(cudaGraphInstantiate(&exec, graph) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
  EXPECT(y.values()[1] == 0);  // nothing has run yet
  for (const float value : {2.0f, 7.0f}) {
    x.set(std::vector<float>(8, value));
    EXPECT(cudaGraphLaunch(exec, stream) == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess);
    EXPECT(pinned[0] == 3 * value && y.values()[0] == 0 && y.values()[7] == 3 * value);
  }
  EXPECT(cudaGraphExecDestroy(exec) == cudaSuccess);

  EXPECT(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  void* memory = nullptr;
  EXPECT(cudaMalloc(&memory, 16) == cudaErrorStreamCaptureUnsupported && !memory);
  EXPECT(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
  EXPECT(cudaGetLastError() == cudaErrorStreamCaptureInvalidated && cudaGetLastError() == cudaSuccess);

  EXPECT(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  float pageable;
  EXPECT(cudaMemcpyAsync(&pageable, x.get(), 4, cudaMemcpyDeviceToHost, stream) == cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
  EXPECT(cudaFreeHost(pinned) == cudaSuccess && cudaStreamDestroy(stream) == cudaSuccess);
}

void test_streams() {
  cudaStream_t stream;
  cudaEvent_t event;
  EXPECT(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  EXPECT(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
  float* pinned = nullptr;
  EXPECT(cudaMallocHost(reinterpret_cast<void**>(&pinned), 8 * sizeof(float)) == cudaSuccess);
  const Device<float> x(std::vector<float>(8, 0.0f)), y(std::vector<float>(8, 0.0f));
  std::vector<float> pageable(8, 1.0f);
  const auto copy = [&](void* to, const void* from, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, 8 * sizeof(float), kind, stream) == cudaSuccess;
  };

  // Pageable memory is read and written at once, pinned memory when somebody waits.
  EXPECT(copy(x.get(), pageable.data(), cudaMemcpyHostToDevice));
  pageable[0] = 2;
  launch(scale, {1, 8}, stream, x.get(), 3.0f, y.get());
  pinned[0] = 4;
  EXPECT(copy(pinned, y.get(), cudaMemcpyDeviceToHost) && cudaEventRecord(event, stream) == cudaSuccess);
  EXPECT(copy(x.get(), pinned, cudaMemcpyHostToDevice));
  EXPECT(pinned[0] == 4 && x.values()[0] == 0);
  EXPECT(cudaEventSynchronize(event) == cudaSuccess && pinned[0] == 3 && x.values()[0] == 1);
  pinned[0] = 5;  // too early
  EXPECT(copy(pageable.data(), x.get(), cudaMemcpyDeviceToHost) && pageable[0] == 5 && pageable[1] == 3);

  EXPECT(cudaFreeHost(pinned) == cudaSuccess && cudaEventDestroy(event) == cudaSuccess);
  EXPECT(cudaStreamDestroy(stream) == cudaSuccess);
}

// Several of the host's threads.
void test_host_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([i] {
      cudaStream_t stream;
      EXPECT(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
      const Device<float> x(std::vector<float>(8, static_cast<float>(i))), y(std::vector<float>(8, 0.0f));
      for (int run = 0; run < 20; ++run) {
        launch(scale, {1, 8}, stream, x.get(), 3.0f, y.get());
        EXPECT(cudaStreamSynchronize(stream) == cudaSuccess && y.values()[7] == static_cast<float>(3 * i));
      }
      EXPECT(cudaStreamDestroy(stream) == cudaSuccess);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void test_memory() {
  setenv("VPTQ_EMULATED_MEMORY", "1000", 1);
  size_t free = 0, total = 0;
  void *a = nullptr, *b = nullptr;
  EXPECT(cudaMalloc(&a, 600) == cudaSuccess);
  EXPECT(cudaMemGetInfo(&free, &total) == cudaSuccess && free == 400 && total == 1000);
  EXPECT(cudaMalloc(&b, 401) == cudaErrorMemoryAllocation && !b);
  EXPECT(cudaMalloc(&b, 400) == cudaSuccess && cudaFree(b) == cudaSuccess && cudaFree(a) == cudaSuccess);
  unsetenv("VPTQ_EMULATED_MEMORY");
  char host[8];
  EXPECT(cudaMemcpy(host, host + 4, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
}

void test_devices() {
  setenv("VPTQ_EMULATED_DEVICES", "2", 1);
  setenv("VPTQ_EMULATED_MEMORY", "1000,2000", 1);
  int n = 0;
  size_t free = 0, total = 0;
  EXPECT(cudaGetDeviceCount(&n) == cudaSuccess && n == 2);
  EXPECT(cudaSetDevice(2) == cudaErrorInvalidDevice && cudaSetDevice(1) == cudaSuccess);
  cudaStream_t stream;
  EXPECT(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  {
    const Device<float> x(std::vector<float>(8, 1.0f)), y(std::vector<float>(8, 0.0f));
    EXPECT(cudaMemGetInfo(&free, &total) == cudaSuccess && total == 2000 && free == 2000 - 2 * 8 * sizeof(float));
    launch(scale, {1, 8}, stream, x.get(), 3.0f, y.get());
    EXPECT(cudaSetDevice(0) == cudaSuccess);
    EXPECT(cudaMemGetInfo(&free, &total) == cudaSuccess && total == 1000 && free == 1000);
    EXPECT(cudaMemsetAsync(y.get(), 0, 8 * sizeof(float), stream) == cudaErrorInvalidResourceHandle);
    EXPECT(cudaSetDevice(1) == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess && y.values()[7] == 3);
  }
  EXPECT(cudaStreamDestroy(stream) == cudaSuccess && cudaSetDevice(0) == cudaSuccess);
  unsetenv("VPTQ_EMULATED_DEVICES");
  unsetenv("VPTQ_EMULATED_MEMORY");
}

__global__ void idle() {}

bool launches(const Shape& shape) {
  try {
    launch(idle, shape, nullptr);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

void test_capabilities() {
  cudaFuncAttributes attributes;
  const auto found = [&] { return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(idle)); };
  EXPECT(found() == cudaSuccess);
  setenv("VPTQ_EMULATED_CAPABILITY", "75", 1);
  cudaDeviceProp properties;
  EXPECT(cudaGetDeviceProperties(&properties, 0) == cudaSuccess && properties.major == 7 && properties.minor == 5);
  EXPECT(found() == cudaErrorNoKernelImageForDevice && !launches({1, 32}));
  unsetenv("VPTQ_EMULATED_CAPABILITY");
}

void test_shapes() {
  EXPECT(launches({1, 32}) && launches({1, 1024}) && launches({dim3(1, 65535), 1, 48 << 10}));
  EXPECT(!launches({1, 0}) && !launches({0, 32}) && !launches({1, 1025}) && !launches({dim3(1, 65536), 32}));
  EXPECT(!launches({1, 32, (48 << 10) + 1}));
  allow_shared(idle, 227 << 10);
  EXPECT(launches({1, 32, 227 << 10}) && !launches({1, 32, (227 << 10) + 1}));
  for (const int bytes : {(227 << 10) + 1, (227 << 10) - 1})  // more than there is, or than others may rely on
    EXPECT(cudaFuncSetAttribute(reinterpret_cast<const void*>(idle), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                bytes) == cudaErrorInvalidValue);
}

}  // namespace

void test_runtime_api() {
  test_graphs();
  test_streams();
  test_host_threads();
  test_memory();
  test_devices();
  test_shapes();
  test_capabilities();
}
