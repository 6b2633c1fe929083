#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cpu/machine.h"
#include "overloaded.h"
#include "vptq/error.h"

namespace vptq::cpu {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kAlignment = 64;  // bytes: a cache line, and the widest vector

int checked_threads(int n) {
  if (n < 0 || n > kMaxThreads)
    throw OptionError("n_threads: found " + std::to_string(n) + ", expected 1 to " + std::to_string(kMaxThreads) +
                      ", or 0 for the physical cores");
  return n ? n : physical_cores();
}

}  // namespace

void CpuBackend::Free::operator()(std::byte* p) const { std::free(p); }

CpuBackend::CpuBackend(int n_threads, const std::string& isa)
    : kernels_(kernels_for(isa)), threads_(checked_threads(n_threads)), attention_(kernels_, threads_) {}

std::string CpuBackend::description() const {
  const int n = threads_.size();
  return "cpu (" + std::string(kernels_.isa) + ", " + std::to_string(n) + (n == 1 ? " thread)" : " threads)");
}

size_t CpuBackend::available_memory() const { return cpu::available_memory(); }

std::byte* CpuBackend::allocate(size_t bytes, const std::string& what) {
  void* data = nullptr;  // not aligned_alloc: it would need a multiple of the alignment, and hide what lies behind
  if (posix_memalign(&data, kAlignment, std::max<size_t>(bytes, 1)) != 0) data = nullptr;
  memory_.emplace_back(static_cast<std::byte*>(data));
  if (memory_.back()) return memory_.back().get();
  memory_.pop_back();
  throw OutOfMemoryError("no memory for " + what + ": " + std::to_string(bytes) + " bytes");
}

const float* CpuBackend::vector(const Tensor& weights) {
  if (weights.type == DType::f32) return reinterpret_cast<const float*>(weights.data);
  const size_t n = weights.bytes / 2;
  auto* out = reinterpret_cast<float*>(allocate(n * sizeof(float), "tensor '" + weights.name + "'"));
  to_float(weights.type, weights.data, n, out);
  return out;
}

const float* CpuBackend::vector(const std::vector<float>& values) {
  auto* out = reinterpret_cast<float*>(allocate(values.size() * sizeof(float), "a vector"));
  std::copy(values.begin(), values.end(), out);
  return out;
}

std::unique_ptr<Linear> CpuBackend::linear(const LinearWeights& w, bool rounded) {
  const auto optional = [this](const Tensor* t) { return t ? vector(*t) : nullptr; };
  const float* bias = optional(w.bias);
  using Ready = std::unique_ptr<Linear>;
  return std::visit(Overloaded{[&](const DenseWeights& dense) -> Ready {
                                 return std::make_unique<DenseLinear>(kernels_, w, dense, bias);
                               },
                               [&](const VptqWeights& vptq) -> Ready {
                                 const VptqNorms norms{optional(vptq.scale), optional(vptq.shift),
                                                       optional(vptq.out_scale), optional(vptq.out_shift)};
                                 return std::make_unique<VptqLinear>(kernels_, w, vptq, norms, bias, rounded);
                               }},
                    w.weights);
}

void CpuBackend::embed(const Batch& batch, const Linear& table, float* x) {
  const auto& layer = static_cast<const CpuLinear&>(table);
  threads_.parallel_for(batch.n(), layer.row_work(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) layer.row(batch.tokens[t], x + t * layer.in_features);
  });
}

void CpuBackend::rms_norm(const float* x, int n, int d, const float* weight, float eps, float* out) {
  threads_.parallel_for(n, d, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) kernels_.rms_norm(x + t * d, weight, eps, d, out + t * d);
  });
}

void CpuBackend::apply(std::initializer_list<Projection> projections, const float* x, int n, int n_prompt) {
  const Activations activations{x, n, n_prompt};
  shares_.clear();
  size_t prepared_size = 0;
  int64_t n_units = 0, n_rows = 0;
  for (const Projection& p : projections) {
    const auto& layer = static_cast<const CpuLinear&>(p.layer);
    shares_.push_back({&layer, prepared_size, n_units, p.y});
    prepared_size += size_t(layer.prepared_size(activations));
    n_units += (layer.out_features + layer.row_unit - 1) / layer.row_unit;
    n_rows += layer.out_features;
  }
  if (prepared_.size() < prepared_size) prepared_.resize(prepared_size);
  prepare(activations, prepared_size);

  const int64_t work = int64_t{n} * shares_[0].layer->in_features * n_rows / n_units;
  threads_.parallel_for(n_units, work, [&](int64_t begin, int64_t end) {
    for (const Share& s : shares_) {
      const int64_t unit = s.layer->row_unit, rows = s.layer->out_features;
      const int64_t first = std::clamp<int64_t>((begin - s.first_unit) * unit, 0, rows);
      const int64_t last = std::clamp<int64_t>((end - s.first_unit) * unit, 0, rows);
      if (first < last) s.layer->rows(activations, prepared_.data() + s.prepared, int(first), int(last), s.y);
    }
  });
}

void CpuBackend::prepare(const Activations& x, size_t size) {
  if (size == 0) return;
  const auto items = int64_t(shares_.size()) * x.n;
  const int64_t work = (int64_t(size) + items - 1) / items;
  threads_.parallel_for(items, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Share& s = shares_[i / x.n];
      s.layer->prepare(x, int(i % x.n), prepared_.data() + s.prepared);
    }
  });
}

void CpuBackend::rope(const Batch& batch, int n_head, int head_dim, const float* inv_freq, float* x) {
  const int half = head_dim / 2;
  constexpr int64_t kSineWork = 16;  // multiply-adds that a sine and a cosine cost
  const int64_t work = half * (kSineWork + 4 * n_head);
  threads_.parallel_for(batch.n(), work, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int i = 0; i < half; ++i) {
        const float angle = float(batch.positions[t]) * inv_freq[i];
        const float c = std::cos(angle), s = std::sin(angle);
        for (int head = 0; head < n_head; ++head) {
          float* pair = x + (t * n_head + head) * head_dim + i;
          const float a = pair[0], b = pair[half];
          pair[0] = a * c - b * s;
          pair[half] = b * c + a * s;
        }
      }
  });
}

void CpuBackend::store_kv(const Batch& batch, const KvLayout& layout, int layer, const float* k, const float* v) {
  const int head_dim = layout.head_dim;
  for (int t = 0; t < batch.n(); ++t) {
    const int position = batch.positions[t];
    const int block = batch.first_block[batch.sequences[t]] + position / KvLayout::kBlockTokens;
    std::byte* keys = batch.blocks[block] + layer * layout.layer_bytes();
    for (int head = 0; head < layout.n_head_kv; ++head, keys += layout.head_bytes()) {
      const size_t from = (size_t(t) * layout.n_head_kv + head) * head_dim;
      kernels_.store_kv(k + from, v + from, layout.type, head_dim, position % KvLayout::kBlockTokens, keys,
                        keys + layout.layer_bytes() / 2);
    }
  }
}

void CpuBackend::swiglu(float* gate, const float* up, size_t n) {
  constexpr int64_t kExpWork = 8;  // multiply-adds that one element costs
  threads_.parallel_for(int64_t(n), kExpWork,
                        [&](int64_t begin, int64_t end) { kernels_.swiglu(gate + begin, up + begin, end - begin); });
}

void CpuBackend::add(float* x, const float* y, size_t n) { kernels_.add(x, y, int64_t(n)); }

void CpuBackend::select_outputs(const Batch& batch, int d, const float* x, float* out) {
  for (size_t i = 0; i < batch.outputs.size(); ++i)
    std::memcpy(out + i * d, x + size_t(batch.outputs[i]) * d, d * sizeof(float));
}

}  // namespace vptq::cpu
