// The operations of backend.h on the CPU: shares the work out to threads and calls the kernels.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/thread_pool.h"

namespace vptq::cpu {

class CpuBackend : public Backend {
 public:
  // isa "": as VPTQ_CPU_ISA says, or the best. Throws OptionError.
  explicit CpuBackend(int n_threads, const std::string& isa = "");

  std::string description() const override;
  size_t available_memory() const override;
  int max_tokens() const override { return 128; }
  bool rounding_pays() const override { return kernels_.i16_pays; }
  std::byte* allocate(size_t bytes, const std::string& what) override;

  void write(std::byte* to, const void* host, size_t bytes) override { std::memcpy(to, host, bytes); }
  void read(const std::byte* from, void* host, size_t bytes) override { std::memcpy(host, from, bytes); }

  std::unique_ptr<Linear> linear(const LinearWeights& weights, bool rounded) override;
  std::unique_ptr<Linear> table(const LinearWeights& weights) override { return linear(weights, false); }
  const float* vector(const Tensor& weights) override;
  const float* vector(const std::vector<float>& values) override;

  void forward(const Batch&, const Batch&, std::span<float> logits, TopLogits*, bool,
               const std::function<void(float*)>& operations) override {
    operations(logits.data());
  }
  void embed(const Batch& batch, const Linear& table, float* x) override;
  void rms_norm(const float* x, int n, int d, const float* weight, float eps, float* out) override;
  void apply(std::initializer_list<Projection> projections, const float* x, int n, int n_prompt) override;
  void rope(const Batch& batch, int n_head, int head_dim, const float* inv_freq, float* x) override;
  void store_kv(const Batch& batch, const KvLayout& layout, int layer, const float* k, const float* v) override;
  void attention(const Batch& batch, const KvLayout& layout, int layer, int n_head, int window, const float* q,
                 float* out) override {
    attention_.run(batch, layout, layer, n_head, window, q, out);
  }
  void swiglu(float* gate, const float* up, size_t n) override;
  void add(float* x, const float* y, size_t n) override;
  void select_outputs(const Batch& batch, int d, const float* x, float* out) override;

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  // A projection's share of one loop over the rows of several.
  struct Share {
    const CpuLinear* layer;
    size_t prepared;     // where in prepared_ its part begins
    int64_t first_unit;  // the loop's items are units of rows: those of the projections before it
    float* y;
  };

  void prepare(const Activations& x, size_t size);

  const Kernels& kernels_;
  ThreadPool threads_;
  Attention attention_;
  std::vector<std::unique_ptr<std::byte[], Free>> memory_;
  std::vector<float> prepared_;  // what the layers of one apply() have made of x, one behind the other
  std::vector<Share> shares_;    // of one apply()
};

}  // namespace vptq::cpu
