#include "self_check/self_check.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "context/kv_cache.h"
#include "self_check/comparison.h"
#include "self_check/small_layer.h"

namespace vptq {
namespace {

// The most that numbers may differ by: relative L2, in float64.
constexpr double kFloat32 = 1e-5;  // sums in another order
constexpr double kFloat16 = 1e-3;  // a prompt's

// Linear layers. A GPU has tiles of several shapes, the larger for longer prompts and for more outputs: so tall layers
// have as many as the model's, up to where no more tiles come, and few columns. Wide ones are for loops over columns.
constexpr int kTall = 12701, kNarrow = 101, kLow = 67, kWide = 4500;
constexpr int kOne[] = {1}, kFew[] = {1, 2, 3, 7};        // tokens in float32: kernels take up to 1, 2, 4 and 8
constexpr int kShort[] = {33}, kLong[] = {65, 129, 257};  // a prompt's
constexpr int kFewBehind = 2;                             // generated tokens in a prompt's batch
constexpr int kUses = 3;                                  // layers on the same x

// Attention.
constexpr int kHeadElements = 1 << 15;  // of a token's query heads
constexpr int kPrompts[] = {75, 45};    // tokens of two sequences: a few blocks of cache each, the last one not full
constexpr int kLongest = 2085;          // of the second one in the end: more blocks than attention is split into parts
constexpr int kWindows[] = {40, 2060};  // in the place of the model's, which may see more
constexpr int kBack[] = {40, 700};      // so many tokens earlier are those of another step of the same sizes
constexpr int kLayer = 1;               // of two

// The other operations.
constexpr int kFeatures = 4096, kTokens = 5;
constexpr int kVocab = 20000, kLargest = 104;

// About as many at most, and the same number modulo 32: loops leave over what they do in the model.
int at_most(int n, int most) { return n <= most ? n : most / 32 * 32 + n % 32; }

std::string tokens(int n) { return std::to_string(n) + (n == 1 ? " token" : " tokens"); }

// Adds tokens [begin, end) of a sequence.
void append(Batch& batch, int sequence, int begin, int end) {
  for (int position = begin; position < end; ++position) {
    batch.tokens.push_back(0);
    batch.positions.push_back(position);
    batch.sequences.push_back(sequence);
  }
}

Batch batch_of(int n) {
  Batch batch;
  batch.first_block = {0};
  append(batch, 0, 0, n);
  return batch;
}

class SelfCheck {
 public:
  SelfCheck(Backend& device, Backend& cpu, const SelfCheckScope& scope)
      : compare_(device, cpu), scope_(scope), h_(scope.model.hyperparameters()) {
    const int per_kv = std::min(h_.n_head / h_.n_head_kv, std::max(1, kHeadElements / h_.head_dim));
    n_head_kv_ = std::clamp(kHeadElements / (per_kv * h_.head_dim), 1, h_.n_head_kv);
    n_head_ = per_kv * n_head_kv_;
  }

  void run() {
    const bool last = scope_.layers.end == h_.n_layer;
    if (scope_.layers.begin == 0) embed();
    rms_norm();
    linear_layers(last);
    rope();
    attention();
    elementwise();
    select_outputs();
    if (last && compare_.device.backend.max_top_logits() > 0) largest_logits();
  }

 private:
  // A kind of linear layers: one of them, and how large they are at most.
  struct Kind {
    const LinearWeights* layer = nullptr;
    int in_features = 0, out_features = 0;
  };

  void embed();
  void rms_norm();
  void linear_layers(bool with_output);
  void linear_layer(const std::string& kind, const LinearWeights& w, std::span<const int> few,
                    std::span<const int> prompts);
  void rope();
  void attention();
  void store(const KvLayout& layout, const Batch& batch);
  void attend(const std::string& operation, const KvLayout& layout, double most, std::span<const Batch> plays);
  void elementwise();
  void select_outputs();
  void largest_logits();

  Comparison compare_;
  const SelfCheckScope& scope_;
  const Hyperparameters& h_;
  int n_head_, n_head_kv_;  // the model's, unless a token's heads have more than kHeadElements
  // All weights there have been: backends know them by where they lie.
  std::deque<SmallLayer> layers_;
};

void SelfCheck::embed() {
  const LinearWeights& like = scope_.model.token_embd();
  const int n_rows = 9, columns = at_most(h_.n_embd, kFeatures);
  const LinearWeights& w = layers_.emplace_back(like, n_rows, columns, compare_.random).weights();
  const size_t n = size_t(kTokens) * w.in_features;
  Batch batch = batch_of(kTokens);
  for (int t = 0; t < kTokens; ++t) batch.tokens[t] = (7 * t + 3) % n_rows;
  std::deque<std::unique_ptr<Linear>> tables;
  const Problem problem = [&](Side& s) -> Step {
    float* out = s.results(n);
    const Linear& table = *tables.emplace_back(s.backend.table(w));
    return {out, [out, &table, &b = s.backend](const Batch& batch) { b.embed(batch, table, out); }};
  };
  compare_.check("embed", kFloat32, problem, n, batch);
}

void SelfCheck::rms_norm() {
  const int d = at_most(h_.n_embd, kFeatures);
  const std::vector<float> x = compare_.numbers(size_t(kTokens) * d), weight = compare_.numbers(d);
  const Problem problem = [&](Side& s) -> Step {
    float* out = s.results(x.size());
    return {out, [=, this, &b = s.backend, x = s.copy(x), weight = s.copy(weight)](const Batch&) {
              b.rms_norm(x, kTokens, d, weight, h_.rms_eps, out);
            }};
  };
  compare_.check("rms_norm", kFloat32, problem, x.size(), batch_of(1));
}

void SelfCheck::linear_layers(bool with_output) {
  std::map<std::pair<std::string, bool>, Kind> kinds;
  const auto add = [&](const LinearWeights& layer, bool rounded) {
    Kind& kind = kinds[{kind_of(layer), rounded}];
    kind.layer = &layer;
    kind.in_features = std::max(kind.in_features, layer.in_features);
    kind.out_features = std::max(kind.out_features, layer.out_features);
  };
  for (int i = scope_.layers.begin; i < scope_.layers.end; ++i)
    for (const LinearWeights* layer : scope_.model.layers()[i].linear_layers()) add(*layer, scope_.rounded);
  if (with_output) add(scope_.model.output(), false);

  for (const auto& [name, kind] : kinds) {
    const bool rounded = name.second;
    const auto small = [&](int most_outputs, int most_columns) -> const LinearWeights& {
      const int outputs = std::min(kind.out_features, most_outputs), columns = at_most(kind.in_features, most_columns);
      return layers_.emplace_back(*kind.layer, outputs, columns, compare_.random).weights();
    };
    const auto prompts = [&](std::span<const int> all) { return rounded ? all : std::span<const int>(); };
    linear_layer(name.first, small(kLow, kWide), kFew, prompts(kShort));
    linear_layer(name.first, small(kTall, kNarrow), kOne, prompts(kLong));
  }
}

// W x of a layer w, for n tokens x (n, in_features), the first n_prompt a prompt's: y (n_uses, n, out_features), by as
// many projections.
std::vector<float> apply(Side& side, const Linear& layer, const LinearWeights& w, const std::vector<float>& x, int n,
                         int n_prompt, int n_uses) {
  const size_t n_in = w.in_features, n_out = w.out_features;
  const Problem problem = [&](Side& s) -> Step {
    float* y = s.results(n_uses * n * n_out);
    return {y, [=, &layer, &b = s.backend, x = s.copy(x)](const Batch&) {
              for (int t = 0, step; t < n; t += step) {
                step = std::min(n - t, b.max_tokens());
                const auto use = [&](int u) { return Projection{layer, y + (u * n + t) * n_out}; };
                const int of_prompt = std::clamp(n_prompt - t, 0, step);
                if (n_uses == 1)
                  b.apply({use(0)}, x + t * n_in, step, of_prompt);
                else
                  b.apply({use(0), use(1), use(2)}, x + t * n_in, step, of_prompt);
              }
            }};
  };
  return Comparison::solve(side, problem, n_uses * n * n_out, std::vector{batch_of(1)});
}

// few, prompts: numbers of tokens in float32 and in 16-bit numbers, ascending.
void SelfCheck::linear_layer(const std::string& kind, const LinearWeights& w, std::span<const int> few,
                             std::span<const int> prompts) {
  const int most = std::max(few.back(), prompts.empty() ? 0 : prompts.back());
  const std::vector<float> x = compare_.numbers(size_t(most) * w.in_features);
  const std::vector<float> expected = apply(compare_.cpu, *compare_.cpu.backend.linear(w, false), w, x, most, 0, 1);

  Backend& device = compare_.device.backend;
  const size_t extra = device.extra_memory(w);
  for (const size_t allowed : std::set<size_t, std::greater<>>{extra, 0}) {
    const std::string name = "linear layers (" + kind + ")" + (allowed < extra ? " in little memory" : "");
    device.allow_extra_memory(allowed);
    const auto layer = compare_.attempt(name, [&] { return device.linear(w, !prompts.empty()); });
    const auto check = [&](int n, int n_prompt) {
      const int n_few = n - n_prompt;
      const std::string operation = name + ", " + tokens(n_prompt ? n_prompt : n) + (n_prompt ? " of a prompt" : "") +
                                    (n_prompt && n_few ? " and " + std::to_string(n_few) + " generated" : "");
      const int n_uses = n_few ? kUses : 1;
      const auto found =
          compare_.attempt(operation, [&] { return apply(compare_.device, *layer, w, x, n, n_prompt, n_uses); });
      const size_t size = size_t(n) * w.out_features, of_prompt = size_t(n_prompt) * w.out_features;
      for (int u = 0; u < n_uses; ++u) {
        const auto y = std::span(found).subspan(u * size, size), right = std::span(expected).first(size);
        compare_.expect(operation, kFloat16, y.first(of_prompt), right.first(of_prompt));
        compare_.expect(operation, kFloat32, y.subspan(of_prompt), right.subspan(of_prompt));
      }
    };
    for (const int n : few) check(n, 0);
    if (allowed < extra || prompts.empty()) continue;  // to prompts it makes no difference
    for (const int n : prompts) check(n, n);
    check(prompts.front(), prompts.front() - kFewBehind);
  }
}

void SelfCheck::rope() {
  const int last = h_.n_ctx_train - 1;
  Batch batch = batch_of(kTokens);
  batch.positions = {0, std::min(1, last), std::min(77, last), last / 2, last};
  for (const int n_head : std::set{n_head_, n_head_kv_}) {
    const std::vector<float> x = compare_.numbers(size_t(kTokens) * n_head * h_.head_dim);
    const Problem problem = [&](Side& s) -> Step {
      float* out = s.copy(x);
      return {out, [=, this, &b = s.backend, inv_freq = s.copy(h_.inv_freq)](const Batch& batch) {
                b.rope(batch, n_head, h_.head_dim, inv_freq, out);
              }};
    };
    compare_.check("rope", kFloat32, problem, x.size(), batch);
  }
}

// Of two sequences what is a prompt; then one of them becomes long; then of both a token as generated.
void SelfCheck::attention() {
  KvLayout layout = scope_.layout;
  layout.n_layer = kLayer + 1;
  layout.n_head_kv = n_head_kv_;
  Side &device = compare_.device, &cpu = compare_.cpu;
  const int64_t n_blocks = KvLayout::blocks_for(kPrompts[0]) + KvLayout::blocks_for(kLongest);
  KvCache on_device({{device.backend, layout}}, kLongest, n_blocks),
      on_cpu({{cpu.backend, layout}}, kLongest, n_blocks);
  Batch nothing;
  const auto add = [&](Side& side, KvCache& cache, int length) {
    const int id = cache.new_sequence({});
    cache.reserve(id, length);
    cache.append_memory(id, 0, side.blocks);
  };
  for (const int length : {kPrompts[0], kLongest}) {
    nothing.first_block.push_back(int32_t(device.blocks.size()));
    compare_.attempt("store_kv", [&] { add(device, on_device, length); });
    add(cpu, on_cpu, length);
  }
  Batch prompts = nothing, both = nothing, generated = nothing;
  append(prompts, 0, 0, kPrompts[0]);
  append(prompts, 1, 0, kPrompts[1]);
  if (scope_.rounded) prompts.n_prompt = prompts.n();
  attend("store_kv and attention of prompts", layout, scope_.rounded ? kFloat16 : kFloat32, std::span(&prompts, 1));

  for (int begin = kPrompts[1], end; begin < kLongest - 1; begin = end) {
    end = std::min(begin + prompts.n(), kLongest - 1);
    Batch batch = nothing;
    append(batch, 1, begin, end);
    store(layout, batch);
  }
  append(generated, 0, kPrompts[0] - 1, kPrompts[0]);
  append(generated, 1, kLongest - 1, kLongest);
  generated.outputs = {0, 1};  // such a step is recorded
  Batch earlier = generated;
  for (int i : {0, 1}) earlier.positions[i] -= kBack[i];
  // The first one is done as it is, the second recorded, and the last one done from the recording.
  attend("store_kv and attention of generated tokens", layout, kFloat32, std::vector{generated, generated, earlier});
  if (!scope_.rounded) return;
  append(both, 0, kPrompts[0] / 2, kPrompts[0]);
  both.n_prompt = both.n();
  append(both, 1, kLongest - 1, kLongest);
  attend("store_kv and attention of prompts and generated tokens", layout, kFloat16, std::span(&both, 1));
}

void SelfCheck::store(const KvLayout& layout, const Batch& batch) {
  const std::vector<float> k = compare_.numbers(size_t(batch.n()) * n_head_kv_ * h_.head_dim);
  const std::vector<float> v = compare_.numbers(k.size());
  const auto on = [&](Side& s) {
    s.forget();
    const float *there_k = s.copy(k), *there_v = s.copy(v);
    s.forward(batch, [&](const Batch& b) { s.backend.store_kv(b, layout, kLayer, there_k, there_v); });
  };
  compare_.attempt("store_kv", [&] { on(compare_.device); });
  on(compare_.cpu);
}

void SelfCheck::attend(const std::string& operation, const KvLayout& layout, double most,
                       std::span<const Batch> plays) {
  std::set<int> windows;
  for (int i = scope_.layers.begin; i < scope_.layers.end; ++i)
    for (const int window : kWindows) windows.insert(std::min(h_.sliding_window[i], window));
  const int n = plays[0].n();
  const size_t size = size_t(n) * n_head_ * h_.head_dim;
  const std::vector<float> k = compare_.numbers(size_t(n) * n_head_kv_ * h_.head_dim);
  const std::vector<float> v = compare_.numbers(k.size()), q = compare_.numbers(size, 4);
  const std::vector<float> other_k = compare_.numbers(k.size()), other_v = compare_.numbers(k.size());
  const Problem problem = [&](Side& s) -> Step {
    float *out = s.results(windows.size() * size), *there_k = s.copy(k), *there_v = s.copy(v);
    return {out,
            [&, out, there_k, there_v, q = s.copy(q)](const Batch& batch) {
              s.backend.store_kv(batch, layout, kLayer, there_k, there_v);
              float* to = out;
              for (const int window : windows) {
                s.backend.attention(batch, layout, kLayer, n_head_, window, q, to);
                to += size;
              }
            },
            [&, there_k, there_v] {
              s.write(other_k, there_k);
              s.write(other_v, there_v);
            }};
  };
  compare_.check(operation, most, problem, windows.size() * size, plays);
}

void SelfCheck::elementwise() {
  const std::vector<float> x = compare_.numbers(size_t(kTokens) * at_most(h_.n_ff, kFeatures), 8);
  const std::vector<float> y = compare_.numbers(x.size());
  const Problem swiglu = [&](Side& s) -> Step {
    float* gate = s.copy(x);
    return {gate, [&, gate, up = s.copy(y)](const Batch&) { s.backend.swiglu(gate, up, x.size()); }};
  };
  const Problem add = [&](Side& s) -> Step {
    float* sum = s.copy(x);
    return {sum, [&, sum, other = s.copy(y)](const Batch&) { s.backend.add(sum, other, x.size()); }};
  };
  compare_.check("swiglu", kFloat32, swiglu, x.size(), batch_of(1));
  compare_.check("add", kFloat32, add, x.size(), batch_of(1));
}

void SelfCheck::select_outputs() {
  const int d = at_most(h_.n_embd, kFeatures);
  const std::vector<float> x = compare_.numbers(size_t(kTokens) * d);
  Batch batch = batch_of(kTokens);
  batch.outputs = {1, kTokens - 1};
  const size_t n = batch.outputs.size() * d;
  const Problem problem = [&](Side& s) -> Step {
    float* out = s.results(n);
    return {out, [&, out, x = s.copy(x)](const Batch& batch) { s.backend.select_outputs(batch, d, x, out); }};
  };
  compare_.check("select_outputs", kFloat32, problem, n, batch);
}

// How many of those that were found in a row of logits (n_vocab) are not what sorting it finds.
int count_wrong(const float* logits, const TopLogits& top, int row) {
  std::vector<int32_t> order(top.n_vocab);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + top.n_largest, order.end(),
                    [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  std::multiset<int32_t> expected(order.begin(), order.begin() + top.n_largest);
  for (int i = 0; i < top.n_tokens; ++i) expected.insert(top.tokens[row * top.n_tokens + i]);
  int n_wrong = 0;
  for (int i = 0; i < top.row_size(); ++i) {
    const Candidate& found = top.found[row * top.row_size() + i];
    const auto it = expected.find(found.token);
    if (it != expected.end() && found.logit == logits[found.token])
      expected.erase(it);
    else
      ++n_wrong;
  }
  return n_wrong;
}

void SelfCheck::largest_logits() {
  const std::string operation = "the largest logits";
  Side& device = compare_.device;
  const int n_vocab = at_most(h_.n_vocab, kVocab), n_rows = 2;
  const int n_largest = std::min({kLargest, n_vocab, device.backend.max_top_logits()});
  const std::vector<float> logits = compare_.numbers(size_t(n_rows) * n_vocab, 10);
  TopLogits top{n_vocab, n_largest, 1, {n_vocab - 1, 0}, {}};
  compare_.attempt(operation, [&] {
    device.forget();
    Batch batch = batch_of(n_rows), outputs;
    batch.n_prompt = n_rows;  // such a step is not recorded
    batch.outputs = {0, 1};
    outputs.take_outputs_of(batch);
    const float* x = device.copy(logits);
    device.backend.forward(batch, outputs, {}, &top, true,
                           [&](float* out) { device.backend.select_outputs(batch, n_vocab, x, out); });
  });
  int n_wrong = 0;
  for (int row = 0; row < n_rows; ++row) n_wrong += count_wrong(logits.data() + size_t(row) * n_vocab, top, row);
  if (n_wrong > 0)
    compare_.fail(operation, std::to_string(n_wrong) + " of " + std::to_string(top.found.size()) +
                                 " are not those that sorting finds, expected none");
}

}  // namespace

void self_check(Backend& device, Backend& cpu, const SelfCheckScope& scope) { SelfCheck(device, cpu, scope).run(); }

}  // namespace vptq
