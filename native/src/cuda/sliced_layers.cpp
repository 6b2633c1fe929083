#include "cuda/sliced_layers.h"

#include <algorithm>
#include <thread>

#include "overloaded.h"

namespace vptq::cuda {
namespace {

// body(begin, end) for parts of [0, n), each on a thread of its own.
template <class Body>
void in_parallel(int n, const Body& body) {
  const int n_threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, std::max(n, 1));
  std::vector<std::jthread> threads;
  for (int i = 0; i < n_threads; ++i)
    threads.emplace_back([&body, begin = int64_t{n} * i / n_threads, end = int64_t{n} * (i + 1) / n_threads] {
      body(static_cast<int>(begin), static_cast<int>(end));
    });
}

template <class T>
const T* send(Memory& memory, const std::vector<T>& values, const std::string& what) {
  std::byte* to = memory.allocate(values.size() * sizeof(T), what);
  memory.send(to, reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T));
  return reinterpret_cast<const T*>(to);
}

}  // namespace

size_t SlicedLayers::bytes(const LinearWeights& layer) const {
  return std::visit(Overloaded{[](const DenseWeights&) -> size_t { return 0; },
                               [&](const VptqWeights& w) -> size_t {
                                 if (!LayerSlices::possible(w.columns)) return 0;
                                 return LayerSlices(w.columns, layer.out_features, shared_bytes_).max_bytes();
                               }},
                    layer.weights);
}

std::unique_ptr<SlicedLayer> SlicedLayers::make(const LinearWeights& layer, const VptqWeights& weights) {
  LayerSlices slices(weights.columns, layer.out_features, shared_bytes_);
  in_parallel(slices.n_tasks(), [&](int begin, int end) { slices.count(begin, end); });
  slices.lay_out();
  std::vector<uint32_t> entries(slices.n_chunks() * kChunkEntries);
  in_parallel(slices.n_tasks(), [&](int begin, int end) { slices.fill(begin, end, entries.data()); });
  const std::string what = "layer '" + layer.name + "'";
  const uint32_t* run_begin = send(memory_, slices.run_begin(), what);
  return std::make_unique<SlicedLayer>(n_layers_++, std::move(slices), run_begin, send(memory_, entries, what));
}

const DeviceSliceJobs& SlicedLayers::jobs(std::span<const SlicedLayer* const> layers) {
  std::vector<int> numbers;
  for (const SlicedLayer* layer : layers) numbers.push_back(layer->number);
  if (const auto known = jobs_.find(numbers); known != jobs_.end()) return known->second;
  std::vector<const LayerSlices*> slices;
  for (const SlicedLayer* layer : layers) slices.push_back(&layer->slices);
  const SliceJobs shared = share_out(slices, n_blocks_);
  const DeviceSliceJobs jobs{send(memory_, shared.jobs, "a launch's jobs"), shared.n_blocks, shared.n_centroids,
                             shared.n_columns, shared_bytes_};
  return jobs_.emplace(std::move(numbers), jobs).first->second;
}

}  // namespace vptq::cuda
