// A GPU's operations compared with the CPU's, before it is trusted with a model. docs/exactness.md says how close they
// have to be.
#pragma once

#include "backend.h"

namespace vptq {

// What of a model a backend has got.
struct SelfCheckScope {
  const Model& model;
  LayerRange layers;
  KvLayout layout;  // of the model's cache
  bool rounded;     // prompts go through the layers in 16-bit numbers
};

// On small problems of the kinds that these layers have: every kind of linear layer, embedding, norms, rope, attention
// and the cache, and so on. Throws DeviceError, which names the operation, what was found and what was expected. The
// problems' weights stay in the device's memory: it is to be a backend of its own, and to go afterwards.
void self_check(Backend& device, Backend& cpu, const SelfCheckScope& scope);

}  // namespace vptq
