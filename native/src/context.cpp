#include "vptq/context.h"

#include <algorithm>
#include <limits>

#include "kv_cache.h"
#include "placement.h"
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

  // Some of the layers, where they run.
  struct Part {
    std::unique_ptr<Backend> backend;
    bool rounded;  // prompts, to 16 bits
    Transformer transformer;
    Batch batch;  // the one at hand, with this part's blocks of the cache
  };

  State(std::shared_ptr<const Model> m, const ContextOptions& options, const KvLayout& layout, Placement placement)
      : model(std::move(m)),
        n_ctx(options.n_ctx),
        why_not_cuda(std::move(placement.why_not_cuda)),
        cache(cache_parts(placement, layout), n_ctx) {
    cache.check_memory(n_ctx);
    bool copied = false;
    for (auto& [backend, layers] : placement.parts) {
      const bool rounded = rounds(*backend, options);
      copied |= backend->total_memory() > 0;
      n_batch = std::min(n_batch, backend->max_tokens());
      Transformer transformer(*model, layers, *backend, rounded, options.progress);
      parts.push_back({std::move(backend), rounded, std::move(transformer), {}});
    }
    if (copied) model->file().drop_pages();
  }

  static std::vector<KvCache::Part> cache_parts(const Placement& placement, KvLayout layout) {
    std::vector<KvCache::Part> parts;
    for (const Placement::Part& part : placement.parts) {
      layout.n_layer = part.layers.size();
      parts.push_back({*part.backend, layout});
    }
    return parts;
  }

  // The feeds that fill_batch() has listed; their logits, or what `top` wants of them.
  void forward(std::span<const Feed> feeds, std::span<float> logits, TopLogits* top = nullptr) {
    lengths.clear();
    for (const Feed& feed : feeds) lengths.push_back(cache.length(feed.sequence));
    try {
      extend(feeds);
      run(logits, top);
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
      if (prompt) batch.n_prompt = batch.n();
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
      if (n > size_t(n_batch))
        throw OptionError("a batch of " + std::to_string(n) + " tokens or more, expected at most " +
                          std::to_string(n_batch));
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
    for (const Feed& feed : feeds) cache.extend(feed.sequence, static_cast<int>(feed.tokens.size()));
    for (size_t i = 0; i < parts.size(); ++i) {
      Batch& own = parts[i].batch = batch;
      if (!parts[i].rounded) own.n_prompt = 0;
      for (const Feed& feed : feeds) {
        const auto& blocks = cache.blocks(feed.sequence, i);
        own.first_block.push_back(static_cast<int>(own.blocks.size()));
        own.blocks.insert(own.blocks.end(), blocks.begin(), blocks.end());
      }
    }
  }

  // The batch through all parts.
  void run(std::span<float> logits, TopLogits* top) {
    if (parts.size() > 1) x.resize(size_t(batch.n()) * model->hyperparameters().n_embd);
    for (size_t i = 0; i < parts.size(); ++i)
      parts[i].transformer.forward(parts[i].batch, cache.layout(i), x, logits, top);
  }

  // Whether the samplers need but a part of the logits that the backend finds; then `top` becomes that part.
  bool ask_for_top(std::span<Sampler* const> samplers) {
    size_t n_largest = 0, n_tokens = 0;
    for (auto sampler = samplers.begin(); sampler != samplers.end(); ++sampler) {
      const size_t n = (*sampler)->n_candidates();
      if (n == 0 || n > size_t(parts.back().backend->max_top_logits())) return false;
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
  int n_batch = std::numeric_limits<int>::max();  // what every part can do at once
  std::string why_not_cuda;
  std::vector<Part> parts;  // in the order of their layers
  KvCache cache;
  Batch batch;                     // but for the blocks, which each part has its own of
  std::vector<float> x;            // (n, n_embd): the residual stream on its way from one part to the next
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
  if (options.gpu_layers < -1 || (options.gpu_layers > 0 && options.device == "cpu") ||
      (options.gpu_layers == 0 && options.device == "cuda"))
    throw OptionError("gpu_layers: found " + std::to_string(options.gpu_layers) + ", expected " +
                      (options.device == "cpu"    ? "0, or none, with device cpu"
                       : options.device == "cuda" ? "at least 1 with device cuda"
                                                  : "at least 0"));
  const Hyperparameters& h = model->hyperparameters();
  const KvLayout layout{h.n_layer, h.n_head_kv, h.head_dim, kv_type_of(options.kv_type, h.head_dim)};
  try {
    state_ = std::make_unique<State>(model, options, layout, place(*model, layout, options));
  } catch (const Error& e) {  // what the place for it has not shown
    if (options.device != "auto" || options.gpu_layers >= 0) throw;
    ContextOptions on_cpu = options;
    on_cpu.device = "cpu";
    state_ = std::make_unique<State>(model, on_cpu, layout, place(*model, layout, on_cpu));
    state_->why_not_cuda = e.what();
  }
}

Context::~Context() = default;

const Model& Context::model() const { return *state_->model; }
std::string Context::device() const {
  if (state_->parts.size() == 1) return state_->parts[0].backend->description();
  std::string all;
  for (const State::Part& part : state_->parts) {
    const int n = part.transformer.layers().size();
    all += (all.empty() ? "" : ", ") + part.backend->description() + " with " + std::to_string(n) +
           (n == 1 ? " layer" : " layers");
  }
  return all;
}
const std::string& Context::why_not_cuda() const { return state_->why_not_cuda; }
int Context::n_ctx() const { return state_->n_ctx; }
size_t Context::available_memory() const { return state_->parts.back().backend->available_memory(); }
int Context::n_batch() const { return state_->n_batch; }

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
