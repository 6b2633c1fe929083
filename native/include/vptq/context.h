// A model on a device, with a KV cache shared by many sequences.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
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

enum class Want { none, last, all };  // whose logits of a feed's tokens

// Tokens to append to a sequence, at least one. What precision "auto" computes them in, `prompt` says, and nothing
// else: neither how a prompt is cut into feeds nor what else is in the batch.
struct Feed {
  int sequence;
  std::span<const int32_t> tokens;
  bool prompt = false;  // they are part of a prompt; false: generated
  Want want = Want::last;
  const Sampler* sampler = nullptr;  // who will draw from the logits
};

struct LogProbs {
  std::vector<double> tokens;
  std::vector<std::vector<std::pair<int32_t, double>>> top;  // of each token's rivals the likeliest
};

struct Logits {
  std::shared_ptr<float[]> data;  // (n, n_vocab)
  size_t n;
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
  int n_layer() const;
  size_t available_memory() const;  // bytes that could still be allocated where the output is
  int n_batch() const;              // most tokens of one call, over all its sequences

  // The KV cache's blocks of block_tokens() tokens have numbers from 0 to n_blocks() - 1. One may belong to several
  // sequences, and be held; it is free when nobody uses it.
  static int block_tokens();
  int64_t n_blocks() const;  // less where memory has ended before, until there is no sequence
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

  // Appends, as one batch; each sequence at most once. Where every feed with wanted logits has a sampler, a GPU brings
  // only what these need, and log_probs(), logits() and masks are not to be asked for. An error leaves all sequences as
  // they were. Throws OptionError, OutOfMemoryError, FileError (logits that are not finite), DeviceError.
  void forward(std::span<const Feed> feeds);

  // The same, but computed by advance(), some layers at a time. At most one batch is under way; forward() may come in
  // between, with other sequences: those of the batch under way are busy, and feeding, truncating or freeing one throws
  // OptionError.
  void begin(std::span<const Feed> feeds);
  // So many more layers of the batch under way; true: it has come to its end, as forward() does. An error abandons it.
  bool advance(int n_layers);
  void abandon();  // the batch under way never was; without one nothing happens

  // Of the batch that came to its end last; none after an error in another one's last layers:

  // Each feed's next tokens, none without a sampler: drawn from the logits of its first wanted token on, as long as the
  // token drawn is the next one of the feed. So of drafts those that were right are drawn again from their own logits.
  // masks: none, or one a feed, (wanted tokens, mask_words(n_vocab)) as Sampler::sample has them, or empty.
  // An error leaves all samplers as they were. Throws OptionError.
  void sample(std::span<Sampler* const> samplers, std::span<const std::span<const int32_t>> masks,
              std::vector<std::vector<int32_t>>& out);
  // Log-softmax of tokens[i] at the feed's i-th wanted token, and there the n_top (0 to 64) likeliest tokens, likeliest
  // first, of equal ones the lower token first. In float64, of the logits as the model gives them. Throws OptionError.
  LogProbs log_probs(int feed, std::span<const int32_t> tokens, int n_top) const;
  // (wanted tokens, n_vocab); the context's own until the next batch comes to its end. Throws OptionError.
  Logits logits(int feed) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vptq
