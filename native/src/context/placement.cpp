#include "context/placement.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string_view>

#include "context/transformer.h"
#include "self_check/self_check.h"
#include "vptq/error.h"

namespace vptq {
namespace {

constexpr size_t kKeptFree = 64;  // of a GPU's memory one part in so many: for what else uses the GPU

bool self_check_is_wanted() {
  const char* wanted = std::getenv("VPTQ_SELF_CHECK");
  return !wanted || std::string_view(wanted) != "off";
}

// Tokens that the cache is to hold.
int64_t kv_tokens(const ContextOptions& options) { return std::max<int64_t>(options.n_ctx, options.kv_tokens); }

// The layers from range.begin on, at most to range.end, that fit.
LayerRange most_that_fit(const LayerBytes& bytes, LayerRange range, double free) {
  LayerRange out{range.begin, range.begin};
  while (out.end < range.end && bytes.of({out.begin, out.end + 1}) <= free) ++out.end;
  return out;
}

std::vector<LayerRange> filled(const LayerBytes& bytes, LayerRange layers, std::span<const size_t> free, double share) {
  std::vector<LayerRange> out;
  int at = layers.begin;
  for (const size_t each : free) {
    out.push_back(most_that_fit(bytes, {at, layers.end}, share * double(each)));
    at = out.back().end;
  }
  if (at < layers.end) out.clear();
  return out;
}

// The GPUs, each with what is free for layers; they come to be when they are needed.
class Gpus {
 public:
  // Throws as make_cuda_backend() and Backend::check_limits().
  Gpus(const Model& model, const KvLayout& layout, const ContextOptions& options)
      : model_(model), layout_(layout), options_(options), n_devices_(cuda_device_count()) {
    add();
  }

  bool more() const { return int(backends_.size()) < n_devices_; }
  // One that cannot be used ends the list, unless it is the first.
  void add() {
    try {
      backends_.push_back(make_cuda_backend(int(backends_.size())));
    } catch (const Error&) {
      if (backends_.empty()) throw;
      n_devices_ = int(backends_.size());
      return;
    }
    const Backend& gpu = *backends_.back();
    gpu.check_limits(model_, options_.n_ctx);
    // As much as the activations take, operations may take for themselves.
    const size_t others =
        2 * Transformer::activation_bytes(model_.hyperparameters(), gpu.max_tokens()) + gpu.total_memory() / kKeptFree;
    free_.push_back(gpu.available_memory() - std::min(others, gpu.available_memory()));
  }

  // with_extra: and what makes layers faster.
  LayerBytes bytes(bool with_extra) const {
    const int n_layer = model_.hyperparameters().n_layer;
    const auto extra = [&](const LinearWeights& w) { return with_extra ? double(backends_[0]->extra_memory(w)) : 0; };
    LayerBytes out;
    for (int i = 0; i < n_layer; ++i) {
      out.layers.push_back(double(model_.layer_bytes(i)) + kv_bytes());
      for (const LinearWeights* w : model_.layers()[i].linear_layers()) out.layers.back() += extra(*w);
    }
    out.embedding = double(model_.embedding_bytes());
    out.output = double(model_.output_bytes()) + extra(model_.output());
    if (model_.tied()) out.shared = out.embedding;
    return out;
  }

  double kv_bytes() const {
    return double(KvLayout::blocks_for(kv_tokens(options_))) * double(layout_.layer_bytes());
  }  // a layer's
  const std::vector<size_t>& free() const { return free_; }
  double all_free() const { return std::accumulate(free_.begin(), free_.end(), 0.0); }

  // Throws DeviceError where a GPU that gets layers computes other numbers than the CPU.
  void check(const std::vector<LayerRange>& ranges) const {
    const std::unique_ptr<Backend> cpu = make_cpu_backend(options_.n_threads);
    for (size_t i = 0; i < ranges.size(); ++i) {
      if (ranges[i].size() == 0) continue;
      const std::unique_ptr<Backend> gpu = make_cuda_backend(int(i));  // whose memory is free again afterwards
      self_check(*gpu, *cpu, {model_, ranges[i], layout_, rounds(*gpu, options_)});
    }
  }

  // The GPUs that got layers, as parts. Three quarters of what is left of their memory may make the layers faster.
  std::vector<Placement::Part> take(const std::vector<LayerRange>& ranges) {
    const LayerBytes least = bytes(false);
    std::vector<Placement::Part> parts;
    for (size_t i = 0; i < ranges.size(); ++i) {
      if (ranges[i].size() == 0) continue;
      backends_[i]->allow_extra_memory(size_t(0.75 * (double(free_[i]) - least.of(ranges[i]))));
      parts.push_back({std::move(backends_[i]), ranges[i]});
    }
    return parts;
  }

 private:
  const Model& model_;
  KvLayout layout_;
  const ContextOptions& options_;
  int n_devices_;
  std::vector<std::unique_ptr<Backend>> backends_;
  std::vector<size_t> free_;
};

// These layers on as few GPUs as hold them and what makes them faster, or else on all, or nowhere.
std::vector<LayerRange> on_gpus(Gpus& gpus, LayerRange layers) {
  for (const bool with_extra : {true, false}) {
    const LayerBytes bytes = gpus.bytes(with_extra);
    while (true) {
      std::vector<LayerRange> ranges = split(bytes, layers, gpus.free());
      if (!ranges.empty()) return ranges;
      if (!gpus.more()) break;
      gpus.add();
    }
  }
  return {};
}

// How many of the last layers fit on the GPUs.
int most_layers(const Gpus& gpus, int n_layer) {
  const LayerBytes bytes = gpus.bytes(false);
  int n = 0;
  while (n < n_layer && !split(bytes, {n_layer - n - 1, n_layer}, gpus.free()).empty()) ++n;
  return n;
}

std::string does_not_fit(const Gpus& gpus, LayerRange layers, const ContextOptions& options, int most) {
  const LayerBytes bytes = gpus.bytes(false);
  const size_t n_layer = bytes.layers.size(), n = layers.size(), n_gpus = gpus.free().size();
  const double need = bytes.of(layers);
  const std::string option = options.kv_tokens > options.n_ctx ? "kv_tokens" : "n_ctx";
  return "device cuda: the " +
         (n == n_layer ? "model's weights" : "weights of " + std::to_string(n) + (n == 1 ? " layer" : " layers")) +
         " of " + gib(need - double(n) * gpus.kv_bytes()) + " and the KV cache for " +
         std::to_string(kv_tokens(options)) + " tokens (option " + option + ") need " + gib(need) + ", " +
         gib(gpus.all_free()) + " are available" + (n_gpus > 1 ? " on " + std::to_string(n_gpus) + " GPUs" : "") +
         "; " + std::to_string(most) + " of " + std::to_string(n_layer) +
         " layers fit (option gpu_layers), and a smaller " + option + ", or kv_type q8_0, needs less";
}

}  // namespace

double LayerBytes::of(LayerRange range) const {
  if (range.size() == 0) return 0;
  const bool first = range.begin == 0, last = range.end == int(layers.size());
  return std::accumulate(layers.begin() + range.begin, layers.begin() + range.end, 0.0) + (first ? embedding : 0) +
         (last ? output : 0) - (first && last ? shared : 0);
}

std::vector<LayerRange> split(const LayerBytes& bytes, LayerRange layers, std::span<const size_t> free) {
  constexpr int kSteps = 20;  // of a bisection: to a millionth
  std::vector<LayerRange> best = filled(bytes, layers, free, 1);
  double low = 0, high = 1;
  for (int i = 0; i < kSteps && !best.empty(); ++i) {
    const double middle = (low + high) / 2;
    std::vector<LayerRange> ranges = filled(bytes, layers, free, middle);
    (ranges.empty() ? low : high) = middle;
    if (!ranges.empty()) best = std::move(ranges);
  }
  return best;
}

bool rounds(const Backend& backend, const ContextOptions& options) {
  return options.precision == "auto" && backend.rounding_pays();
}

Placement place(const Model& model, const KvLayout& layout, const ContextOptions& options) {
  const int n_layer = model.hyperparameters().n_layer;
  const bool as_many_as_fit = options.device == "auto" && options.gpu_layers < 0;
  int n_gpu = options.device == "cpu" ? 0 : options.gpu_layers < 0 ? n_layer : std::min(options.gpu_layers, n_layer);
  Placement out;
  std::optional<Gpus> gpus;
  try {
    if (n_gpu > 0) gpus.emplace(model, layout, options);
  } catch (const Error& e) {
    if (!as_many_as_fit) throw;
    out.why_not_cuda = e.what();
    n_gpu = 0;
  }
  if (gpus) {
    std::vector<LayerRange> ranges = on_gpus(*gpus, {n_layer - n_gpu, n_layer});
    if (ranges.empty()) {
      const int most = most_layers(*gpus, n_layer);
      out.why_not_cuda = does_not_fit(*gpus, {n_layer - n_gpu, n_layer}, options, most);
      if (!as_many_as_fit) throw OutOfMemoryError(out.why_not_cuda);
      n_gpu = most;
      ranges = split(gpus->bytes(false), {n_layer - n_gpu, n_layer}, gpus->free());
    }
    if (self_check_is_wanted()) gpus->check(ranges);
    out.parts = gpus->take(ranges);
  }
  if (n_gpu < n_layer)
    out.parts.insert(out.parts.begin(), Placement::Part{make_cpu_backend(options.n_threads), {0, n_layer - n_gpu}});
  return out;
}

}  // namespace vptq
