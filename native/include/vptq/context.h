// A model on a device, with a KV cache shared by many sequences.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "vptq/model.h"
#include "vptq/sampler.h"

namespace vptq {

struct ContextOptions {
  std::string device = "auto";  // auto, cpu or cuda
  // So many of the last layers, and the output, on GPUs, the others on the CPU; more than there are: all of them.
  // -1: all; with device auto as many as fit.
  int gpu_layers = -1;
  int n_ctx = 4096;             // most tokens of one sequence
  int n_threads = 0;            // 0: the physical cores
  std::string kv_type = "f16";  // f16, f32, or q8_0: blocks of 32 int8 and an f16 scale
  // auto: prompts' tokens may go through the linear layers in 16-bit numbers, where that is faster; f32: never
  std::string precision = "auto";
  std::function<void(int, int)> progress;  // called while loading: layers that are ready, and all
};

// Tokens to append to a sequence. What precision "auto" computes them in, `prompt` says, and nothing else: neither how
// a prompt is cut into feeds nor what else is in the batch.
struct Feed {
  int sequence;
  std::span<const int32_t> tokens;
  bool prompt = true;  // they are part of a prompt; false: generated
};

// Not thread-safe: one call at a time.
class Context {
 public:
  // Throws OptionError, UnsupportedError, DeviceError, OutOfMemoryError (where not even one sequence of n_ctx tokens
  // would fit).
  Context(std::shared_ptr<const Model> model, const ContextOptions& options);
  ~Context();

  const Model& model() const;
  std::string device() const;
  const std::string& why_not_cuda() const;  // why device "auto" has not put all layers on GPUs; else empty
  int n_ctx() const;
  size_t available_memory() const;  // bytes that could still be allocated where the output is
  int n_batch() const;              // most tokens of one call, over all its sequences

  int new_sequence(int n_tokens);  // with cache reserved for n_tokens tokens
  void free_sequence(int sequence);
  void reserve(int sequence, int n_tokens);   // cache for n_tokens tokens in all
  void truncate(int sequence, int n_tokens);  // forgets all but the first n_tokens, and what was reserved
  int length(int sequence) const;

  // Appends; computes no logits. Each sequence at most once in a call.
  void prefill(std::span<const Feed> feeds);
  // Appends, as one batch, and puts each sequence's next token, sampled and not appended, into out (feeds).
  void step(std::span<const Feed> feeds, std::span<Sampler* const> samplers, int32_t* out);
  // Appends; puts the logits of every token into out (n_tokens, n_vocab).
  void logits(const Feed& feed, float* out);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vptq
