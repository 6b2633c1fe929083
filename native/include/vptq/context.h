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
  // Most tokens of all sequences, at least n_ctx. 0: as many as three quarters of the memory hold that the weights
  // leave, from one to 64 sequences of n_ctx. Memory is taken when it is needed.
  int64_t kv_tokens = 0;
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
  // Throws OptionError, UnsupportedError, OutOfMemoryError (where not even one sequence of n_ctx tokens would fit).
  Context(std::shared_ptr<const Model> model, const ContextOptions& options);
  ~Context();

  const Model& model() const;
  std::string device() const;
  const std::string& why_not_cuda() const;  // why device "auto" has not put all layers on GPUs; else empty
  int n_ctx() const;
  int n_layer() const;
  size_t available_memory() const;  // bytes that could still be allocated where the output is
  int n_batch() const;              // most tokens of one call, over all its sequences

  // The KV cache's blocks of block_tokens() tokens have numbers from 0 to n_blocks() - 1. One may belong to several
  // sequences, and be held; it is free when nobody uses it.
  static int block_tokens();
  int64_t n_blocks() const;  // becomes less where memory ends before
  int64_t n_free_blocks() const;

  // Begins with these blocks, shared with whoever else has them: full ones, in use or held.
  int new_sequence(std::span<const int32_t> prefix = {});
  void free_sequence(int sequence);
  // Forgets all but the first n_tokens, and gives back the blocks behind them. Throws OptionError where a part of a
  // block would be left that others use, too.
  void truncate(int sequence, int n_tokens);
  int length(int sequence) const;                       // without those of a batch under way
  std::span<const int32_t> blocks(int sequence) const;  // in the order of its tokens, until the next call
  void hold(std::span<const int32_t> blocks);           // one more user of each, which must be in use
  void release(std::span<const int32_t> blocks);        // takes back as many hold()s

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
