// The operations of backend.h on a GPU: keeps the weights there, launches the kernels, and records the launches of a
// decoding step to play them again.
#pragma once

#include <limits>
#include <map>
#include <memory>
#include <string>
#include <variant>

#include "backend.h"
#include "cuda/batches.h"
#include "cuda/copy_bandwidth.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "cuda/sliced_layers.h"
#include "cuda/top_logits_reader.h"

namespace vptq::cuda {

// A linear layer whose weights are on the GPU.
struct CudaLinear : Linear {
  int in_features, out_features;
  std::variant<DenseLayer, VqLayer> layer;
  bool rounded = false;                 // prompts go through it in f16
  std::unique_ptr<SlicedLayer> sliced;  // for tokens in float32, where there is memory for it

  // Of a batch whose first n_prompt tokens are prompts', the first that it takes in float32, as all after it.
  int first_few(int n_prompt) const { return rounded ? n_prompt : 0; }
};

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(int device);
  ~CudaBackend() override;

  std::string description() const override;
  size_t available_memory() const override;
  size_t total_memory() const override;
  double copy_bandwidth() override;
  int max_tokens() const override { return 512; }
  bool rounding_pays() const override { return true; }
  void check_limits(const Model& model, int n_ctx) const override;
  std::byte* allocate(size_t bytes, const std::string& what) override;
  void write(std::byte* to, const void* host, size_t bytes) override;
  void read(const std::byte* from, void* host, size_t bytes) override;

  size_t extra_memory(const LinearWeights& w) const override;
  void allow_extra_memory(size_t bytes) override { extra_left_ = bytes; }
  std::unique_ptr<Linear> linear(const LinearWeights& w, bool rounded) override;
  std::unique_ptr<Linear> table(const LinearWeights& w) override;
  const float* vector(const Tensor& weights) override;
  const float* vector(const std::vector<float>& values) override;

  void forward(const Batch& batch, const Batch& outputs, std::span<float> logits, TopLogits* top, bool whole,
               const std::function<void(float*)>& operations) override;
  int max_top_logits() const override { return 512; }
  void embed(const Batch& batch, const Linear& table, float* x) override;
  void rms_norm(const float* x, int n, int d, const float* weight, float eps, float* out) override;
  void apply(std::initializer_list<Projection> projections, const float* x, int n, int n_prompt) override;
  void rope(const Batch& batch, int n_head, int head_dim, const float* inv_freq, float* x) override;
  void store_kv(const Batch& batch, const KvLayout& layout, int layer, const float* k, const float* v) override;
  void attention(const Batch& batch, const KvLayout& layout, int layer, int n_head, int window, const float* q,
                 float* out) override;
  void swiglu(float* gate, const float* up, size_t n) override;
  void add(float* x, const float* y, size_t n) override;
  void select_outputs(const Batch& batch, int d, const float* x, float* out) override;

 private:
  // Memory that grows with what is asked of it; whatever was recorded with it before is forgotten then.
  struct Buffer {
    std::byte* data = nullptr;
    size_t bytes = 0;
  };
  // The step of so many generated tokens: run once as it is, so that all buffers have grown, then recorded.
  struct Step {
    cudaGraphExec_t graph = nullptr;
  };

  std::unique_ptr<CudaLinear> uploaded(const LinearWeights& w);
  DenseLayer upload(const LinearWeights& w, const DenseWeights& dense);
  VqLayer upload(const LinearWeights& w, const VptqWeights& vptq);
  std::unique_ptr<SlicedLayer> sliced(const LinearWeights& w, const VptqWeights& vptq);
  void apply_few(std::initializer_list<Projection> projections, const float* x, int first, int n, int n_prompt);
  void apply_many(const CudaLinear& linear, const float* x, int n, float* y);
  void* grown(Buffer& buffer, size_t bytes, const char* what);
  void play(int n, const std::function<void(float*)>& operations, float* out);
  void forget_steps();

  int device_;
  std::string name_;
  int n_multiprocessors_;
  Stream stream_ = nullptr;
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<Batches> batches_;
  std::unique_ptr<SlicedLayers> sliced_layers_;
  bool slices_ = true;                                      // layers get slices
  size_t extra_left_ = std::numeric_limits<size_t>::max();  // bytes that slices may still take
  Buffer workspace_, logits_;
  TopLogitsReader top_logits_;
  std::map<int, Step> steps_;  // by their number of tokens
  int addresses_ = 0;          // of the batches, when they were recorded
};

}  // namespace vptq::cuda
