#include "cuda/cuda_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "overloaded.h"
#include "vptq/error.h"

namespace vptq::cuda {
namespace {

// The largest magnitude of n numbers in F32, F16 or BF16.
float largest(DType type, const std::byte* data, size_t n) {
  constexpr size_t kAtOnce = 4096;
  float values[kAtOnce], out = 0;
  for (size_t at = 0; at < n; at += kAtOnce) {
    const size_t count = std::min(kAtOnce, n - at);
    to_float(type, data + bytes_of(type, at), count, values);
    for (size_t i = 0; i < count; ++i) out = std::max(out, std::abs(values[i]));
  }
  return out;
}

// What no number of a quantised matrix is larger than.
float bound_of_blocks(const Tensor& t) {
  const TypeLayout layout = layout_of(t.type);
  const auto most = float(1 << (layout.has_min ? layout.bits : layout.bits - 1));
  float out = 0;
  for (size_t at = 0; at < t.bytes; at += layout.block_bytes) {
    uint16_t halves[2];  // d, and m where there is one
    std::memcpy(halves, t.data + at, sizeof(halves));
    const float min = layout.has_min ? std::abs(half_to_float(halves[1])) : 0;
    out = std::max(out, most * std::abs(half_to_float(halves[0])) + min);
  }
  return out;
}

// Whether the products of many tokens find all weights in the range of f16.
bool fits_f16(const LinearWeights& layer) {
  return std::visit(Overloaded{[&](const DenseWeights& w) {
                                 const Tensor& t = w.weight;
                                 if (t.type == DType::f16) return true;
                                 const size_t n = size_t(layer.in_features) * layer.out_features;
                                 return (is_float(t.type) ? largest(t.type, t.data, n) : bound_of_blocks(t)) <
                                        kMostRounded;
                               },
                               [](const VptqWeights& w) {
                                 return std::all_of(w.columns.begin(), w.columns.end(), [](const VqColumns& c) {
                                   if (c.type == DType::f16 && c.r == 0) return true;
                                   const size_t n = size_t(c.n_groups) * c.v;
                                   const float residual = c.r ? largest(c.type, c.res_centroids, n * c.r) : 0;
                                   return largest(c.type, c.centroids, n * c.k) + residual < kMostRounded;
                                 });
                               }},
                    layer.weights);
}

}  // namespace

CudaBackend::CudaBackend(int device) : device_(device) {
  const CurrentDevice current(device_);
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device_), "looking at the GPU");
  name_ = properties.name;
  n_multiprocessors_ = properties.multiProcessorCount;
  if (const cudaError_t error = find_kernels(); error != cudaSuccess) {
    cudaGetLastError();
    throw UnsupportedError("device cuda: kernels cannot be loaded on " + name_ + " (compute capability " +
                           std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                           "): " + cudaGetErrorString(error));
  }
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  memory_ = std::make_unique<Memory>(stream_);
  batches_ = std::make_unique<Batches>(*memory_, max_tokens());
  sliced_layers_ = std::make_unique<SlicedLayers>(*memory_, n_multiprocessors_, properties.sharedMemPerBlockOptin);
  const char* kernel = std::getenv("VPTQ_CUDA_KERNEL");
  slices_ = !kernel || std::string_view(kernel) != "plain";
}

CudaBackend::~CudaBackend() {
  const CurrentDevice current(device_);
  cudaStreamSynchronize(stream_);
  forget_steps();
  for (const Buffer& buffer : {workspace_, logits_}) cudaFree(buffer.data);
  batches_.reset();
  memory_.reset();
  cudaStreamDestroy(stream_);
}

std::string CudaBackend::description() const {
  std::string out = "cuda";
  if (device_) out.append(":").append(std::to_string(device_));
  return out + " (" + name_ + ")";
}

size_t CudaBackend::available_memory() const {
  const CurrentDevice current(device_);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the free memory");
  return free;
}

size_t CudaBackend::total_memory() const {
  const CurrentDevice current(device_);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the memory");
  return total;
}

double CudaBackend::copy_bandwidth() {
  const CurrentDevice current(device_);
  return cuda::copy_bandwidth(stream_, available_memory() / 16);
}

void CudaBackend::check_limits(const Model& model, int n_ctx) const {
  const Hyperparameters& h = model.hyperparameters();
  const auto expect = [&](const char* key, int found, int most) {
    if (found > most)
      throw UnsupportedError(model.file().path() + ": key '" + h.architecture + key + "': " + std::to_string(found) +
                             ", expected at most " + std::to_string(most) + " on a GPU");
  };
  expect(".attention.key_length", h.head_dim, kMaxHeadDim);
  expect(".attention.head_count", h.n_head, kMaxHeads);
  if (n_ctx > kMaxContext)
    throw OptionError("n_ctx: found " + std::to_string(n_ctx) + ", expected at most " + std::to_string(kMaxContext) +
                      " on a GPU");
}

std::byte* CudaBackend::allocate(size_t bytes, const std::string& what) {
  const CurrentDevice current(device_);
  return memory_->allocate(bytes, what);
}

void CudaBackend::write(std::byte* to, const void* host, size_t bytes) {
  const CurrentDevice current(device_);
  check(cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, stream_), "writing to the GPU");
  check(cudaStreamSynchronize(stream_), "writing to the GPU");
}

void CudaBackend::read(const std::byte* from, void* host, size_t bytes) {
  const CurrentDevice current(device_);
  check(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream_), "reading from the GPU");
  check(cudaStreamSynchronize(stream_), "reading from the GPU");
}

const float* CudaBackend::vector(const Tensor& weights) {
  std::vector<float> values(weights.bytes / bytes_of(weights.type, 1));
  to_float(weights.type, weights.data, values.size(), values.data());
  return vector(values);
}

const float* CudaBackend::vector(const std::vector<float>& values) {
  std::byte* out = allocate(values.size() * sizeof(float), "a vector");
  write(out, values.data(), values.size() * sizeof(float));
  return reinterpret_cast<const float*>(out);
}

size_t CudaBackend::extra_memory(const LinearWeights& w) const { return slices_ ? sliced_layers_->bytes(w) : 0; }

std::unique_ptr<Linear> CudaBackend::linear(const LinearWeights& w, bool rounded) {
  const CurrentDevice current(device_);
  auto out = uploaded(w);
  out->rounded = rounded && fits_f16(w);
  if (const auto* vptq = std::get_if<VptqWeights>(&w.weights)) out->sliced = sliced(w, *vptq);
  return out;
}

std::unique_ptr<Linear> CudaBackend::table(const LinearWeights& w) {
  const CurrentDevice current(device_);
  return uploaded(w);
}

std::unique_ptr<CudaLinear> CudaBackend::uploaded(const LinearWeights& w) {
  auto out = std::make_unique<CudaLinear>();
  out->in_features = w.in_features;
  out->out_features = w.out_features;
  std::visit([&](const auto& weights) { out->layer = upload(w, weights); }, w.weights);
  return out;
}

DenseLayer CudaBackend::upload(const LinearWeights& w, const DenseWeights& dense) {
  const Tensor& t = dense.weight;
  return {w.in_features, w.out_features, t.type, memory_->upload(t.data, t.bytes, "tensor '" + t.name + "'"),
          w.bias ? vector(*w.bias) : nullptr};
}

// nullptr where there is no memory for it, or no kernel.
std::unique_ptr<SlicedLayer> CudaBackend::sliced(const LinearWeights& w, const VptqWeights& vptq) {
  const size_t extra = extra_memory(w);
  if (extra == 0 || extra > extra_left_) return nullptr;
  extra_left_ -= extra;
  return sliced_layers_->make(w, vptq);
}

VqLayer CudaBackend::upload(const LinearWeights& w, const VptqWeights& vptq) {
  const std::string what = "layer '" + w.name + "'";
  const auto optional = [&](const Tensor* t) { return t ? vector(*t) : nullptr; };
  VqLayer out{w.in_features,
              w.out_features,
              static_cast<int>(vptq.columns.size()),
              {},
              nullptr,
              optional(vptq.scale),
              optional(vptq.shift),
              optional(vptq.out_scale),
              optional(vptq.out_shift),
              optional(w.bias)};
  for (int i = 0; i < out.n_columns; ++i) {
    VqColumns& c = out.columns[i] = vptq.columns[i];
    const size_t centroid_bytes = bytes_of(c.type, size_t(c.n_groups) * c.v);
    c.indices = memory_->upload(c.indices, size_t(c.n_groups) * c.n_blocks * c.row_bytes, what);
    c.centroids = memory_->upload(c.centroids, c.k * centroid_bytes, what);
    if (c.r) c.res_centroids = memory_->upload(c.res_centroids, c.r * centroid_bytes, what);
  }
  if (vptq.perm)
    out.perm = reinterpret_cast<const uint16_t*>(
        memory_->upload(reinterpret_cast<const std::byte*>(vptq.perm), w.in_features * sizeof(uint16_t), what));
  return out;
}

void* CudaBackend::grown(Buffer& buffer, size_t bytes, const char* what) {
  if (bytes > buffer.bytes) {
    forget_steps();
    check(cudaStreamSynchronize(stream_), what);
    check(cudaFree(buffer.data), what);
    buffer = {};
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), what);
    buffer = {static_cast<std::byte*>(data), bytes};
  }
  return buffer.data;
}

void CudaBackend::forward(const Batch& batch, const Batch& outputs, std::span<float> logits, TopLogits* top, bool whole,
                          const std::function<void(float*)>& operations) {
  const CurrentDevice current(device_);
  batches_->upload(batch, outputs, stream_);
  if (batches_->addresses() != addresses_) forget_steps();
  addresses_ = batches_->addresses();
  const size_t n_logits = top ? size_t(outputs.n()) * top->n_vocab : logits.size();
  auto* out = static_cast<float*>(grown(logits_, n_logits * sizeof(float), "allocating the logits"));
  if (whole && batch.n_prompt == 0 && outputs.n() == batch.n() && batch.n() <= kFewTokens)
    play(batch.n(), operations, out);
  else
    operations(out);
  if (top)
    top_logits_.read(out, outputs.n(), *top, stream_);
  else if (!logits.empty())
    check(cudaMemcpyAsync(logits.data(), out, logits.size_bytes(), cudaMemcpyDeviceToHost, stream_),
          "reading the logits");
  check(cudaStreamSynchronize(stream_), "running a step");
}

void CudaBackend::play(int n, const std::function<void(float*)>& operations, float* out) {
  const auto known = steps_.find(n);
  if (known == steps_.end()) {
    operations(out);
    steps_[n];  // only now: it may have failed, or grown a buffer
    return;
  }
  if (!known->second.graph) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "recording a step");
    try {
      operations(out);
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "recording a step");
    const cudaError_t error = cudaGraphInstantiate(&known->second.graph, graph, 0);
    cudaGraphDestroy(graph);
    check(error, "recording a step");
  }
  check(cudaGraphLaunch(known->second.graph, stream_), "running a recorded step");
}

void CudaBackend::forget_steps() {
  for (const auto& [n, step] : steps_)
    if (step.graph) cudaGraphExecDestroy(step.graph);
  steps_.clear();
}

void CudaBackend::embed(const Batch& batch, const Linear& table, float* x) {
  std::visit([&](const auto& layer) { cuda::embed((*batches_)[batch], layer, x, stream_); },
             static_cast<const CudaLinear&>(table).layer);
}

void CudaBackend::rms_norm(const float* x, int n, int d, const float* weight, float eps, float* out) {
  cuda::rms_norm(x, n, d, weight, eps, out, stream_);
}

void CudaBackend::apply(std::initializer_list<Projection> projections, const float* x, int n, int n_prompt) {
  for (const Projection& p : projections) {
    const auto& linear = static_cast<const CudaLinear&>(p.layer);
    if (const int n_many = linear.first_few(n_prompt)) apply_many(linear, x, n_many, p.y);
  }
  apply_few(projections, x, n_prompt, n, n_prompt);
  if (n_prompt > 0) apply_few(projections, x, 0, n, n_prompt);
}

// Tokens from `first` on in float32, by those layers that begin there: they share launches.
void CudaBackend::apply_few(std::initializer_list<Projection> projections, const float* x, int first, int n,
                            int n_prompt) {
  if (first == n) return;
  x += size_t(first) * static_cast<const CudaLinear&>(projections.begin()->layer).in_features;
  VqUse plain[kMaxUses];
  SlicedUse sliced[kMaxUses];
  const SlicedLayer* slices[kMaxUses];
  int n_plain = 0, n_sliced = 0;
  for (const Projection& p : projections) {
    const auto& linear = static_cast<const CudaLinear&>(p.layer);
    if (linear.first_few(n_prompt) != first) continue;
    float* y = p.y + size_t(first) * linear.out_features;
    std::visit(Overloaded{[&](const DenseLayer& layer) { dense_few(layer, x, n - first, y, stream_); },
                          [&](const VqLayer& layer) {
                            if (const SlicedLayer* s = slices[n_sliced] = linear.sliced.get())
                              sliced[n_sliced++] = {layer, int(s->slices.slices().size()), s->run_begin, s->entries, y};
                            else
                              plain[n_plain++] = {layer, y};
                          }},
               linear.layer);
  }
  if (n_plain) vq_few(plain, n_plain, x, n - first, stream_);
  if (n_sliced) {
    const DeviceSliceJobs& jobs = sliced_layers_->jobs({slices, size_t(n_sliced)});
    const size_t floats = sliced_workspace(sliced, n_sliced, n - first);
    auto* workspace = static_cast<float*>(grown(workspace_, floats * sizeof(float), "allocating workspace"));
    vq_sliced(sliced, n_sliced, jobs, x, n - first, workspace, stream_);
  }
}

void CudaBackend::apply_many(const CudaLinear& linear, const float* x, int n, float* y) {
  void* workspace = grown(workspace_, gemm_workspace(n, linear.in_features), "allocating workspace");
  std::visit(Overloaded{[&](const DenseLayer& layer) { dense_many(layer, x, n, y, workspace, stream_); },
                        [&](const VqLayer& layer) { vq_many(layer, x, n, y, workspace, stream_); }},
             linear.layer);
}

void CudaBackend::rope(const Batch& batch, int n_head, int head_dim, const float* inv_freq, float* x) {
  cuda::rope((*batches_)[batch], n_head, head_dim, inv_freq, x, stream_);
}

void CudaBackend::store_kv(const Batch& batch, const KvLayout& layout, int layer, const float* k, const float* v) {
  cuda::store_kv((*batches_)[batch], layout, layer, k, v, stream_);
}

void CudaBackend::attention(const Batch& batch, const KvLayout& layout, int layer, int n_head, int window,
                            const float* q, float* out) {
  const int n_splits = attention_splits(layout.n_head_kv, n_multiprocessors_);
  const size_t floats = attention_workspace(batch.n(), n_head, layout.head_dim, n_splits);
  auto* workspace = static_cast<float*>(grown(workspace_, floats * sizeof(float), "allocating workspace"));
  cuda::attention((*batches_)[batch], layout, layer, n_head, window, n_splits, q, out, workspace, stream_);
}

void CudaBackend::swiglu(float* gate, const float* up, size_t n) { cuda::swiglu(gate, up, n, stream_); }

void CudaBackend::add(float* x, const float* y, size_t n) { cuda::add(x, y, n, stream_); }

void CudaBackend::select_outputs(const Batch& batch, int d, const float* x, float* out) {
  cuda::select((*batches_)[batch], d, x, out, stream_);
}

}  // namespace vptq::cuda

// What the runtime looks for in this library.
extern "C" {

// Both throw UnsupportedError where there is no GPU.
__attribute__((visibility("default"))) int vptq_cuda_device_count() {
  int n_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&n_devices);
  if (error == cudaSuccess && n_devices > 0) return n_devices;
  throw vptq::UnsupportedError(std::string("device cuda: there is no GPU that can be used: ") +
                               (error != cudaSuccess ? cudaGetErrorString(error) : "the driver lists none"));
}

__attribute__((visibility("default"))) vptq::Backend* vptq_cuda_backend(int device) {
  vptq_cuda_device_count();
  return new vptq::cuda::CudaBackend(device);
}

}  // extern "C"
