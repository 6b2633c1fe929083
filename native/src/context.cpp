#include "vptq/context.h"

#include <algorithm>

#include "kv_cache.h"
#include "transformer.h"
#include "vptq/error.h"

namespace vptq {
namespace {

DType kv_type_of(const std::string& name, int head_dim) {
  if (name == "q8_0" && head_dim % kQ8Block != 0)
    throw OptionError("kv_type: found q8_0, expected f16 or f32: q8_0 takes " + std::to_string(kQ8Block) +
                      " elements together, which do not divide this model's head_dim of " + std::to_string(head_dim));
  for (const auto& [known, type] : {std::pair{"f16", DType::f16}, {"f32", DType::f32}, {"q8_0", DType::q8_0}})
    if (name == known) return type;
  throw OptionError("kv_type: found '" + name + "', expected f16, f32 or q8_0");
}

}  // namespace

struct Context::State {
  enum class Want { none, last, all };  // whose logits

  State(std::shared_ptr<const Model> m, std::unique_ptr<Backend> device, const ContextOptions& options, DType kv_type)
      : model(std::move(m)),
        n_ctx(options.n_ctx),
        backend(std::move(device)),
        cache(*backend,
              KvLayout{model->hyperparameters().n_layer, model->hyperparameters().n_head_kv,
                       model->hyperparameters().head_dim, kv_type},
              n_ctx) {
    const size_t weights = backend->weight_memory(*model, cache.bytes(n_ctx));
    cache.check_memory(n_ctx, weights);
    rounded = options.precision == "auto" && backend->rounding_pays();
    transformer = std::make_unique<Transformer>(*model, *backend, rounded, options.progress);
    if (weights) model->file().drop_pages();  // they are on the device
  }

  // The feeds that fill_batch() has listed; their logits, or what `top` wants of them.
  void forward(std::span<const Feed> feeds, std::span<float> logits, TopLogits* top = nullptr) {
    lengths.clear();
    for (const Feed& feed : feeds) lengths.push_back(cache.length(feed.sequence));
    try {
      extend(feeds);
      transformer->forward(batch, cache.layout(), logits, top);
      if (!(top ? all_finite(top->found) : all_finite(logits)))
        throw FileError(
            model->file().path() +
            ": the logits are not finite: some weights are NaN, infinite, or too large for float32, or some keys or "
            "values for an f16 or q8_0 cache (option kv_type)");
    } catch (...) {  // what was not computed is not there
      for (size_t i = 0; i < feeds.size(); ++i)
        if (cache.length(feeds[i].sequence) > lengths[i]) cache.truncate(feeds[i].sequence, lengths[i]);
      throw;
    }
  }

  // Checks the feeds against the model and lists their tokens, prompts first.
  void fill_batch(std::span<const Feed> feeds, Want want) {
    batch.tokens.clear();
    batch.positions.clear();
    batch.sequences.clear();
    batch.outputs.clear();
    row.resize(feeds.size());
    n_appended = 0;
    check(feeds);
    for (const bool prompt : {true, false}) {
      for (size_t s = 0; s < feeds.size(); ++s)
        if (feeds[s].prompt == prompt) append(feeds[s], s, want);
      if (prompt) batch.n_prompt = rounded ? batch.n() : 0;
    }
  }

  void check(std::span<const Feed> feeds) const {
    const int n_vocab = model->hyperparameters().n_vocab;
    size_t n = 0;
    for (size_t s = 0; s < feeds.size(); ++s) {
      const Feed& feed = feeds[s];
      cache.length(feed.sequence);  // it exists
      for (size_t other = 0; other < s; ++other)
        if (feeds[other].sequence == feed.sequence)
          throw OptionError("sequence " + std::to_string(feed.sequence) + " stands twice in one batch");
      if (feed.tokens.empty())
        throw OptionError("no tokens for sequence " + std::to_string(feed.sequence) + ", expected at least one");
      n += feed.tokens.size();
      if (n > size_t(backend->max_tokens()))
        throw OptionError("a batch of " + std::to_string(n) + " tokens or more, expected at most " +
                          std::to_string(backend->max_tokens()));
      for (const int32_t token : feed.tokens)
        if (token < 0 || token >= n_vocab)
          throw OptionError("token " + std::to_string(token) + ", expected 0 to " + std::to_string(n_vocab - 1));
    }
  }

  // s: the feed's place
  void append(const Feed& feed, size_t s, Want want) {
    row[s] = n_appended++;
    const int length = cache.length(feed.sequence);
    for (size_t i = 0; i < feed.tokens.size(); ++i) {
      if (want == Want::all || (want == Want::last && i + 1 == feed.tokens.size())) batch.outputs.push_back(batch.n());
      batch.tokens.push_back(feed.tokens[i]);
      batch.positions.push_back(length + static_cast<int>(i));
      batch.sequences.push_back(static_cast<int>(s));
    }
  }

  void extend(std::span<const Feed> feeds) {
    batch.first_block.clear();
    batch.blocks.clear();
    for (const Feed& feed : feeds) {
      cache.extend(feed.sequence, static_cast<int>(feed.tokens.size()));
      const auto& blocks = cache.blocks(feed.sequence);
      batch.first_block.push_back(static_cast<int>(batch.blocks.size()));
      batch.blocks.insert(batch.blocks.end(), blocks.begin(), blocks.end());
    }
  }

  // Whether the samplers need but a part of the logits that the backend finds; then `top` becomes that part.
  bool ask_for_top(std::span<Sampler* const> samplers) {
    size_t n_largest = 0, n_tokens = 0;
    for (auto sampler = samplers.begin(); sampler != samplers.end(); ++sampler) {
      const size_t n = (*sampler)->n_candidates();
      if (n == 0 || n > size_t(backend->max_top_logits())) return false;
      // One of two sequences: what it will penalise in the second depends on what it draws in the first.
      if (std::find(samplers.begin(), sampler, *sampler) != sampler) return false;
      n_largest = std::max(n_largest, n);
      n_tokens = std::max(n_tokens, (*sampler)->penalised_tokens().size());
    }
    const int n_vocab = model->hyperparameters().n_vocab;
    top.n_vocab = n_vocab;
    top.n_largest = static_cast<int>(std::min(n_largest, size_t(n_vocab)));
    top.n_tokens = static_cast<int>(n_tokens);
    top.tokens.assign(samplers.size() * n_tokens, 0);  // where there are fewer, that of token 0 does no harm
    for (size_t i = 0; i < samplers.size(); ++i) {
      const std::span<const int32_t> tokens = samplers[i]->penalised_tokens();
      std::replace_copy_if(
          tokens.begin(), tokens.end(), top.tokens.begin() + row[i] * n_tokens,
          [&](int32_t token) { return token < 0 || token >= n_vocab; }, 0);
    }
    return true;
  }

  std::span<const Candidate> candidates(size_t feed) const {
    const size_t n = top.row_size();
    return {top.found.data() + row[feed] * n, n};
  }

  std::shared_ptr<const Model> model;
  int n_ctx;
  bool rounded;  // prompts, to 16 bits
  std::string why_not_cuda;
  std::unique_ptr<Backend> backend;
  KvCache cache;
  std::unique_ptr<Transformer> transformer;
  Batch batch;
  std::vector<size_t> row;         // each feed's place in the batch, prompts first
  size_t n_appended = 0;           // feeds
  std::vector<int> lengths;        // of the sequences at hand, before they are extended
  std::vector<float> step_logits;  // (n_sequences, n_vocab)
  TopLogits top{};                 // of a step, where these are all that is needed
};

Context::Context(std::shared_ptr<const Model> model, const ContextOptions& options) {
  if (options.n_ctx < 1) throw OptionError("n_ctx: found " + std::to_string(options.n_ctx) + ", expected at least 1");
  if (options.precision != "auto" && options.precision != "f32")
    throw OptionError("precision: found '" + options.precision + "', expected auto or f32");
  if (options.device != "auto" && options.device != "cpu" && options.device != "cuda")
    throw OptionError("device: found '" + options.device + "', expected auto, cpu or cuda");
  const DType kv_type = kv_type_of(options.kv_type, model->hyperparameters().head_dim);
  const auto make = [&](std::unique_ptr<Backend> backend) {
    return std::make_unique<State>(model, std::move(backend), options, kv_type);
  };
  std::string why_not_cuda;
  if (options.device != "cpu") {
    try {
      state_ = make(make_cuda_backend());
    } catch (const Error& e) {
      if (options.device == "cuda") throw;
      why_not_cuda = e.what();
    }
  }
  if (!state_) state_ = make(make_cpu_backend(options.n_threads));
  state_->why_not_cuda = why_not_cuda;
}

Context::~Context() = default;

const Model& Context::model() const { return *state_->model; }
std::string Context::device() const { return state_->backend->description(); }
const std::string& Context::why_not_cuda() const { return state_->why_not_cuda; }
int Context::n_ctx() const { return state_->n_ctx; }
size_t Context::available_memory() const { return state_->backend->available_memory(); }
int Context::n_batch() const { return state_->backend->max_tokens(); }

int Context::new_sequence(int n_tokens) { return state_->cache.new_sequence(n_tokens); }
void Context::free_sequence(int sequence) { state_->cache.free_sequence(sequence); }
void Context::reserve(int sequence, int n_tokens) { state_->cache.reserve(sequence, n_tokens); }
void Context::truncate(int sequence, int n_tokens) { state_->cache.truncate(sequence, n_tokens); }
int Context::length(int sequence) const { return state_->cache.length(sequence); }

void Context::prefill(std::span<const Feed> feeds) {
  if (feeds.empty()) return;
  state_->fill_batch(feeds, State::Want::none);
  state_->forward(feeds, {});
}

void Context::step(std::span<const Feed> feeds, std::span<Sampler* const> samplers, int32_t* out) {
  if (samplers.size() != feeds.size())
    throw OptionError(std::to_string(samplers.size()) +
                      " samplers, expected one a sequence: " + std::to_string(feeds.size()));
  for (size_t i = 0; i < feeds.size(); ++i)
    if (!samplers[i])
      throw OptionError("sequence " + std::to_string(feeds[i].sequence) + ": no sampler, expected one a sequence");
  if (feeds.empty()) return;
  state_->fill_batch(feeds, State::Want::last);
  if (state_->ask_for_top(samplers)) {
    state_->forward(feeds, {}, &state_->top);
    for (size_t i = 0; i < feeds.size(); ++i) out[i] = samplers[i]->sample(state_->candidates(i));
    return;
  }
  const size_t n_vocab = model().hyperparameters().n_vocab;
  state_->step_logits.resize(feeds.size() * n_vocab);
  state_->forward(feeds, state_->step_logits);
  for (size_t i = 0; i < feeds.size(); ++i)
    out[i] = samplers[i]->sample({state_->step_logits.data() + state_->row[i] * n_vocab, n_vocab});
}

void Context::logits(const Feed& feed, float* out) {
  const size_t n_vocab = model().hyperparameters().n_vocab;
  state_->fill_batch({&feed, 1}, State::Want::all);
  state_->forward({&feed, 1}, {out, feed.tokens.size() * n_vocab});
}

}  // namespace vptq
