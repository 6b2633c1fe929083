#include "vptq/context.h"

#include <algorithm>
#include <limits>
#include <new>

#include "context/kv_cache.h"
#include "context/placement.h"
#include "context/transformer.h"
#include "sampling/outputs.h"
#include "vptq/error.h"

namespace vptq {
namespace {

constexpr int64_t kMostSequences = 64;   // of n_ctx tokens, that the KV cache has room for unless kv_tokens says so
constexpr double kShareForCache = 0.75;  // of the memory that the weights leave
constexpr size_t kKeptRows = 64;         // of logits, whose memory is kept for the next batch

// Bytes of the weights of these layers in the file.
size_t bytes_of(const Model& model, LayerRange layers) {
  size_t bytes = layers.begin == 0 ? model.embedding_bytes() : 0;
  for (int i = layers.begin; i < layers.end; ++i) bytes += model.layer_bytes(i);
  if (layers.end == model.hyperparameters().n_layer) bytes += model.output_bytes();
  return bytes;
}

}  // namespace

// A batch on its way through the layers.
struct Pass {
  explicit Pass(int n_vocab) : outputs(n_vocab) {}

  struct Fed {
    int sequence, n_tokens;
  };
  std::vector<Fed> feeds;
  Batch batch;               // but for the blocks, which each part has its own of
  std::vector<Batch> parts;  // the same, with them
  std::vector<float> x;      // (n, n_embd): the residual stream on its way from one part to the next
  int n_layers = 0;          // that are behind it
  Outputs outputs;
};

struct Context::State {
  // Some of the layers, where they run.
  struct Part {
    std::unique_ptr<Backend> backend;
    bool rounded;  // prompts, to 16 bits
    Transformer transformer;
  };

  State(std::shared_ptr<const Model> m, const ContextOptions& options, const KvLayout& layout, Placement placement)
      : model(std::move(m)),
        n_ctx(options.n_ctx),
        why_not_cuda(std::move(placement.why_not_cuda)),
        cache(cache_parts(placement, layout), n_ctx,
              KvLayout::blocks_for(options.kv_tokens ? options.kv_tokens : n_ctx)),
        now(n_vocab()),
        under_way(n_vocab()),
        outputs(n_vocab()) {
    cache.check_memory(n_ctx);
    bool copied = false;
    for (auto& [backend, layers] : placement.parts) {
      const bool rounded = rounds(*backend, options);
      copied |= backend->total_memory() > 0;
      n_batch = std::min(n_batch, backend->max_tokens());
      Transformer transformer(*model, layers, *backend, rounded, options.progress);
      parts.push_back({std::move(backend), rounded, std::move(transformer)});
    }
    if (copied) model->file().drop_pages();
    if (options.kv_tokens == 0) cache.allow(blocks_that_fit());
  }

  static std::vector<KvCache::Part> cache_parts(const Placement& placement, KvLayout layout) {
    std::vector<KvCache::Part> parts;
    for (const Placement::Part& part : placement.parts) {
      layout.n_layer = part.layers.size();
      parts.push_back({*part.backend, layout});
    }
    return parts;
  }

  // Blocks for one sequence of n_ctx tokens at least.
  int64_t blocks_that_fit() const {
    const int64_t least = KvLayout::blocks_for(n_ctx);
    double blocks = double(kMostSequences * least);
    for (size_t i = 0; i < parts.size(); ++i) {
      double available = double(parts[i].backend->available_memory());
      // The file's pages count as available, but will be wanted.
      if (parts[i].backend->total_memory() == 0) available -= double(bytes_of(*model, parts[i].transformer.layers()));
      blocks = std::min(blocks, kShareForCache * available / double(cache.layout(i).block_bytes()));
    }
    return std::max(int64_t(blocks), least);
  }

  // Checks the feeds, lists their tokens, prompts first, and reserves blocks for them.
  void start(Pass& pass, std::span<const Feed> feeds) {
    check(feeds);
    Batch& batch = pass.batch;
    pass.feeds.clear();
    batch.tokens.clear();
    batch.positions.clear();
    batch.sequences.clear();
    batch.outputs.clear();
    pass.outputs.start(feeds.size());
    pass.n_layers = 0;
    for (const Feed& feed : feeds) pass.feeds.push_back({feed.sequence, static_cast<int>(feed.tokens.size())});
    for (const bool prompt : {true, false}) {
      for (size_t i = 0; i < feeds.size(); ++i)
        if (feeds[i].prompt == prompt) append(pass, feeds[i], i);
      if (prompt) batch.n_prompt = batch.n();
    }
    pass.outputs.ask(feeds, parts.back().backend->max_top_logits());
    try {
      reserve(pass);
    } catch (...) {
      give_back(pass);
      throw;
    }
  }

  void check(std::span<const Feed> feeds) const {
    if (feeds.empty()) throw OptionError("a batch of no sequences, expected at least one");
    size_t n = 0;
    for (size_t i = 0; i < feeds.size(); ++i) {
      const Feed& feed = feeds[i];
      cache.check_idle(feed.sequence);
      for (size_t other = 0; other < i; ++other)
        if (feeds[other].sequence == feed.sequence)
          throw OptionError("sequence " + std::to_string(feed.sequence) + " stands twice in one batch");
      if (feed.tokens.empty())
        throw OptionError("no tokens for sequence " + std::to_string(feed.sequence) + ", expected at least one");
      n += feed.tokens.size();
      if (n > size_t(n_batch))
        throw OptionError("a batch of " + std::to_string(n) + " tokens or more, expected at most " +
                          std::to_string(n_batch));
      for (const int32_t token : feed.tokens)
        if (token < 0 || token >= n_vocab())
          throw OptionError("token " + std::to_string(token) + ", expected 0 to " + std::to_string(n_vocab() - 1));
    }
  }

  // place: the feed's among all
  void append(Pass& pass, const Feed& feed, size_t place) const {
    Batch& batch = pass.batch;
    pass.outputs.add(place, feed);
    const int length = cache.length(feed.sequence);
    for (size_t i = 0; i < feed.tokens.size(); ++i) {
      if (feed.want == Want::all || (feed.want == Want::last && i + 1 == feed.tokens.size()))
        batch.outputs.push_back(batch.n());
      batch.tokens.push_back(feed.tokens[i]);
      batch.positions.push_back(length + static_cast<int>(i));
      batch.sequences.push_back(static_cast<int>(place));
    }
  }

  void reserve(Pass& pass) {
    for (const Pass::Fed& feed : pass.feeds) cache.reserve(feed.sequence, feed.n_tokens);
    if (parts.size() > 1) pass.x.resize(size_t(pass.batch.n()) * model->hyperparameters().n_embd);
    pass.parts.resize(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      Batch& own = pass.parts[i] = pass.batch;
      if (!parts[i].rounded) own.n_prompt = 0;
      for (const Pass::Fed& feed : pass.feeds) {
        own.first_block.push_back(static_cast<int>(own.blocks.size()));
        cache.append_memory(feed.sequence, i, own.blocks);
      }
    }
  }

  // What was not computed is not there.
  void give_back(Pass& pass) {
    for (const Pass::Fed& feed : pass.feeds) cache.give_back(feed.sequence);
    pass.outputs.start(0);
  }

  // Through so many more layers, at most; whether it has come to its end.
  bool advance(Pass& pass, int n_layers) {
    const int n_layer = model->hyperparameters().n_layer;
    const LayerRange next{pass.n_layers, pass.n_layers + std::min(n_layers, n_layer - pass.n_layers)};
    const bool ends = next.end == n_layer;
    TopLogits* top = pass.outputs.top();
    const size_t n_logits = ends && !top ? pass.outputs.n() * n_vocab() : 0;
    std::shared_ptr<float[]> logits;
    if (ends) {
      outputs.start(0);  // its logits lie where these will
      logits = room(n_logits);
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      Transformer& own = parts[i].transformer;
      const LayerRange layers{std::max(next.begin, own.layers().begin), std::min(next.end, own.layers().end)};
      if (layers.size() > 0) own.forward(pass.parts[i], cache.layout(i), layers, pass.x, {logits.get(), n_logits}, top);
    }
    pass.n_layers = next.end;
    if (!ends) return false;
    pass.outputs.bring(std::move(logits));
    if (!pass.outputs.is_finite())
      throw FileError(model->file().path() +
                      ": the logits are not finite: some weights are NaN, infinite, or too large for float32, or some "
                      "keys or values for an f16 or q8_0 cache (option kv_type)");
    for (const Pass::Fed& feed : pass.feeds) cache.commit(feed.sequence, feed.n_tokens);
    std::swap(outputs, pass.outputs);
    return true;
  }

  void set_under_way(bool is) {
    for (const Pass::Fed& feed : under_way.feeds) cache.set_busy(feed.sequence, is);
    is_under_way = is;
  }

  // For so many logits: where those before lay, unless somebody still has them, or they were very many.
  std::shared_ptr<float[]> room(size_t n) {
    const size_t most_kept = std::max(n, kKeptRows * n_vocab());
    if (logits.use_count() > 1 || n > n_room || n_room > most_kept) {
      logits.reset();
      n_room = 0;  // the next line can throw
      logits = std::make_shared_for_overwrite<float[]>(n);
      n_room = n;
    }
    return logits;
  }

  int n_vocab() const { return model->hyperparameters().n_vocab; }

  std::shared_ptr<const Model> model;
  int n_ctx;
  int n_batch = std::numeric_limits<int>::max();  // what every part can do at once
  std::string why_not_cuda;
  std::vector<Part> parts;  // in the order of their layers
  KvCache cache;
  Pass now;        // of forward()
  Pass under_way;  // of begin(), if there is one
  bool is_under_way = false;
  Outputs outputs;  // of the batch that came to its end last
  std::shared_ptr<float[]> logits;
  size_t n_room = 0;  // floats, there
};

Context::Context(std::shared_ptr<const Model> model, const ContextOptions& options) {
  if (options.n_ctx < 1) throw OptionError("n_ctx: found " + std::to_string(options.n_ctx) + ", expected at least 1");
  if (options.kv_tokens != 0 && options.kv_tokens < options.n_ctx)
    throw OptionError("kv_tokens: found " + std::to_string(options.kv_tokens) +
                      ", expected at least n_ctx = " + std::to_string(options.n_ctx));
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
  const bool may_fall_back = options.device == "auto" && options.gpu_layers < 0;
  std::string why_not_cuda;
  try {
    state_ = std::make_unique<State>(model, options, layout, place(*model, layout, options));
    return;
  } catch (const Error& e) {  // what the place for it has not shown
    if (!may_fall_back) throw;
    why_not_cuda = e.what();
  } catch (const std::bad_alloc&) {
    if (!may_fall_back) throw;
    why_not_cuda = "device cuda: no memory left on the host";
  }
  ContextOptions on_cpu = options;
  on_cpu.device = "cpu";
  state_ = std::make_unique<State>(model, on_cpu, layout, place(*model, layout, on_cpu));
  state_->why_not_cuda = why_not_cuda;
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
int Context::n_layer() const { return model().hyperparameters().n_layer; }
int Context::block_tokens() { return KvLayout::kBlockTokens; }

int64_t Context::n_blocks() const { return state_->cache.n_blocks(); }
int64_t Context::n_free_blocks() const { return state_->cache.n_free_blocks(); }
int Context::new_sequence(std::span<const int32_t> prefix) { return state_->cache.new_sequence(prefix); }
void Context::free_sequence(int sequence) { state_->cache.free_sequence(sequence); }
void Context::truncate(int sequence, int n_tokens) { state_->cache.truncate(sequence, n_tokens); }
int Context::length(int sequence) const { return state_->cache.length(sequence); }
std::span<const int32_t> Context::blocks(int sequence) const { return state_->cache.blocks(sequence); }
void Context::hold(std::span<const int32_t> blocks) { state_->cache.hold(blocks); }
void Context::release(std::span<const int32_t> blocks) { state_->cache.release(blocks); }

void Context::forward(std::span<const Feed> feeds) {
  state_->start(state_->now, feeds);
  try {
    state_->advance(state_->now, n_layer());
  } catch (...) {
    state_->give_back(state_->now);
    throw;
  }
}

void Context::begin(std::span<const Feed> feeds) {
  if (state_->is_under_way)
    throw OptionError("a batch is under way, expected none: advance() it to its end, or abandon() it");
  state_->start(state_->under_way, feeds);
  state_->set_under_way(true);
}

bool Context::advance(int n_layers) {
  if (!state_->is_under_way) throw OptionError("no batch is under way, expected one: begin() it");
  try {
    if (n_layers < 1) throw OptionError("n_layers: found " + std::to_string(n_layers) + ", expected at least 1");
    const bool ended = state_->advance(state_->under_way, n_layers);
    if (ended) state_->set_under_way(false);
    return ended;
  } catch (...) {
    abandon();
    throw;
  }
}

void Context::abandon() {
  if (!state_->is_under_way) return;
  state_->give_back(state_->under_way);
  state_->set_under_way(false);
}

void Context::sample(std::span<Sampler* const> samplers, std::span<const std::span<const int32_t>> masks,
                     std::vector<std::vector<int32_t>>& out) {
  state_->outputs.sample(samplers, masks, out);
}

LogProbs Context::log_probs(int feed, std::span<const int32_t> tokens, int n_top) const {
  return state_->outputs.log_probs(feed, tokens, n_top);
}

Logits Context::logits(int feed) const { return state_->outputs.logits(feed); }

}  // namespace vptq
