// Which layers run where: all on one backend, or the first ones on the CPU and the others on one GPU or several.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend.h"
#include "vptq/context.h"

namespace vptq {

// What a model's layers take of the memory of GPUs, in bytes: doubles, as n_ctx can ask for more than size_t counts.
struct LayerBytes {
  std::vector<double> layers;  // (n_layer)
  double embedding = 0;        // with the first layer
  double output = 0;           // with the last one
  double shared = 0;           // of both, where one GPU has both

  double of(LayerRange range) const;
};

// The layers cut into pieces, one for each of GPUs with so many bytes free, empty ones among them, such that they fill
// the same share of what is free, the smallest that holds the layers. None where they do not fit.
std::vector<LayerRange> split(const LayerBytes& bytes, LayerRange layers, std::span<const size_t> free);

struct Placement {
  struct Part {
    std::unique_ptr<Backend> backend;
    LayerRange layers;
  };
  std::vector<Part> parts;   // in the order of their layers
  std::string why_not_cuda;  // why device "auto" has not put all layers on GPUs; else empty
};

// Whether prompts go through a backend's layers in 16-bit numbers.
bool rounds(const Backend& backend, const ContextOptions& options);

// As options.device and options.gpu_layers want it, with memory for a cache of n_ctx tokens, or kv_tokens where
// these are more, that has `layout`. Throws UnsupportedError (no GPU, or a model that is beyond its kernels),
// OutOfMemoryError (too few bytes free), DeviceError (other numbers than the CPU's: self_check/) where these leave no
// choice, OptionError.
Placement place(const Model& model, const KvLayout& layout, const ContextOptions& options);

}  // namespace vptq
