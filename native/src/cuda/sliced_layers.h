// Layers whose indices are on the GPU in the order of slices.h, and the jobs of the launches that they take part in.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "cuda/slices.h"

namespace vptq::cuda {

struct SlicedLayer {
  int number;  // that no other layer has had
  LayerSlices slices;
  const uint32_t *run_begin, *entries;
};

class SlicedLayers {
 public:
  // n_blocks, shared_bytes: the GPU's multiprocessors, and what a block of threads can have of their shared memory.
  SlicedLayers(Memory& memory, int n_blocks, size_t shared_bytes)
      : memory_(memory), n_blocks_(n_blocks), shared_bytes_(shared_bytes) {}

  // Bytes that these will take at most, beside the weights; 0 where the weights are not for vq_sliced.
  size_t bytes(const LinearWeights& layer) const;
  // Of a layer's weights that are for vq_sliced.
  std::unique_ptr<SlicedLayer> make(const LinearWeights& layer, const VptqWeights& weights);
  // Those of a launch of these layers, shared out when it is the first one.
  const DeviceSliceJobs& jobs(std::span<const SlicedLayer* const> layers);

 private:
  Memory& memory_;
  int n_blocks_;
  size_t shared_bytes_;
  int n_layers_ = 0;
  std::map<std::vector<int>, DeviceSliceJobs> jobs_;  // by the layers' numbers
};

}  // namespace vptq::cuda
