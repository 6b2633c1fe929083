#include "vptq/model.h"

#include <cmath>
#include <limits>

#include "vptq/error.h"

namespace vptq {
namespace {

constexpr uint64_t kFormatVersion = 1;
constexpr int kMaxHeadDim = 1024;

// Typed access to the keys of a file; every failure names the key.
class Keys {
 public:
  explicit Keys(const GgufFile& file) : file_(file) {}

  [[noreturn]] void fail(const std::string& key, const std::string& what) const {
    throw FileError(file_.path() + ": key '" + key + "': " + what);
  }

  bool has(const std::string& key) const { return file_.find_key(key) != nullptr; }

  template <class T>
  const T& get(const std::string& key, const char* type) const {
    const GgufValue* value = file_.find_key(key);
    if (!value) fail(key, "missing");
    const T* typed = std::get_if<T>(value);
    if (!typed) fail(key, std::string("wrong type, expected ") + type);
    return *typed;
  }

  int count(const std::string& key, int most = 1 << 24) const {
    const uint64_t n = get<uint64_t>(key, "an unsigned integer");
    if (n < 1 || n > uint64_t(most)) fail(key, std::to_string(n) + ", expected 1 to " + std::to_string(most));
    return static_cast<int>(n);
  }

  double positive(const std::string& key) const {
    const double x = get<double>(key, "a float");
    if (!(x > 0) || std::isinf(x)) fail(key, std::to_string(x) + ", expected a positive number");
    return x;
  }

 private:
  const GgufFile& file_;
};

std::vector<int> read_sliding_window(const Keys& keys, const std::string& arch, int n_layer) {
  const std::string key = arch + ".attention.sliding_window", pattern_key = key + "_pattern";
  if (!keys.has(key)) return std::vector<int>(n_layer, 0);
  std::vector<int> windows(n_layer, keys.count(key, std::numeric_limits<int>::max()));
  if (!keys.has(pattern_key)) return windows;
  const auto& pattern = keys.get<GgufArray>(pattern_key, "an array");
  if (pattern.size() != size_t(n_layer))
    keys.fail(pattern_key,
              std::to_string(pattern.size()) + " entries, expected one a layer: " + std::to_string(n_layer));
  for (int i = 0; i < n_layer; ++i) {
    const bool* windowed = std::get_if<bool>(&pattern[i]);
    if (!windowed) keys.fail(pattern_key, "wrong type, expected an array of booleans");
    if (!*windowed) windows[i] = 0;
  }
  return windows;
}

// inv_freq[i] = rope_theta^(-2i / head_dim), in float32 as transformers computes it; then the scaling: a factor for all
// (linear) or one for each frequency (rope_freqs.weight, which is how llama3 scaling is written).
std::vector<float> read_inv_freq(const Keys& keys, const GgufFile& file, const std::string& arch, int head_dim) {
  const auto theta = static_cast<float>(keys.positive(arch + ".rope.freq_base"));
  std::vector<float> inv_freq(head_dim / 2);
  for (int i = 0; i < head_dim / 2; ++i) inv_freq[i] = 1.0f / std::pow(theta, float(2 * i) / float(head_dim));

  const std::string type_key = arch + ".rope.scaling.type";
  if (keys.has(type_key)) {
    const auto type = keys.get<std::string_view>(type_key, "a string");
    if (type == "linear") {
      const auto factor = static_cast<float>(keys.positive(arch + ".rope.scaling.factor"));
      for (float& f : inv_freq) f /= factor;
    } else if (type != "none") {
      throw UnsupportedError(file.path() + ": key '" + type_key + "': rope scaling '" + std::string(type) +
                             "', expected linear or none");
    }
  }
  if (const Tensor* factors = file.find("rope_freqs.weight")) {
    if (factors->type != DType::f32 || factors->shape != std::vector<int64_t>{head_dim / 2})
      throw FileError(file.path() + ": tensor 'rope_freqs.weight': type " + type_name(factors->type) + ", shape " +
                      shape_text(factors->shape) + ", expected F32, (" + std::to_string(head_dim / 2) + ",)");
    for (int i = 0; i < head_dim / 2; ++i) {
      const float factor = reinterpret_cast<const float*>(factors->data)[i];
      if (!(factor > 0) || std::isinf(factor))
        throw FileError(file.path() + ": tensor 'rope_freqs.weight': entry " + std::to_string(i) + " is " +
                        std::to_string(factor) + ", expected a positive number");
      inv_freq[i] /= factor;
    }
  }
  return inv_freq;
}

Hyperparameters read_hyperparameters(const GgufFile& file) {
  const Keys keys(file);
  Hyperparameters h;
  h.architecture = keys.get<std::string_view>("general.architecture", "a string");
  const std::string& arch = h.architecture;
  // A plain GGUF may have its q and k rows in another order: only files that say theirs are run.
  if (!keys.has("vptq.version")) throw FileError(file.path() + ": " + kPlainGguf);
  if (arch != "llama" && arch != "qwen2")
    throw UnsupportedError(file.path() + ": key 'general.architecture': '" + arch + "', expected llama or qwen2");
  const uint64_t version = keys.get<uint64_t>("vptq.version", "an unsigned integer");
  if (version != kFormatVersion) keys.fail("vptq.version", std::to_string(version) + ", expected 1");
  if (keys.get<std::string_view>("vptq.qk_row_order", "a string") != "huggingface")
    keys.fail("vptq.qk_row_order", "another order, expected huggingface");

  h.n_layer = keys.count(arch + ".block_count", 4096);
  h.n_ctx_train = keys.count(arch + ".context_length", std::numeric_limits<int>::max());
  h.n_embd = keys.count(arch + ".embedding_length");
  h.n_ff = keys.count(arch + ".feed_forward_length");
  h.n_vocab = keys.count(arch + ".vocab_size");
  h.n_head = keys.count(arch + ".attention.head_count", 65536);
  h.n_head_kv = keys.count(arch + ".attention.head_count_kv", 65536);
  h.head_dim = keys.count(arch + ".attention.key_length", kMaxHeadDim);
  if (h.n_head % h.n_head_kv != 0)
    keys.fail(arch + ".attention.head_count",
              std::to_string(h.n_head) + ", expected a multiple of head_count_kv, " + std::to_string(h.n_head_kv));
  if (h.head_dim % 2 != 0)
    keys.fail(arch + ".attention.key_length", std::to_string(h.head_dim) + ", expected an even number");
  for (const char* same : {".attention.value_length", ".rope.dimension_count"})
    if (keys.count(arch + same) != h.head_dim)
      keys.fail(arch + same, "differs from key_length, " + std::to_string(h.head_dim));
  h.rms_eps = static_cast<float>(keys.positive(arch + ".attention.layer_norm_rms_epsilon"));
  h.inv_freq = read_inv_freq(keys, file, arch, h.head_dim);
  h.sliding_window = read_sliding_window(keys, arch, h.n_layer);
  return h;
}

Tensor need_norm(const GgufFile& file, const std::string& name, int n) {
  const Tensor* t = file.find(name);
  if (!t) throw FileError(file.path() + ": tensor '" + name + "': missing");
  if (t->shape != std::vector<int64_t>{n})
    throw FileError(file.path() + ": tensor '" + name + "': shape " + shape_text(t->shape) + ", expected " +
                    shape_text({n}));
  if (!is_float(t->type))
    throw FileError(file.path() + ": tensor '" + name + "': type " + type_name(t->type) +
                    ", expected F32, F16 or BF16");
  return *t;
}

}  // namespace

Model::Model(const std::string& path) : file_(path), hyperparameters_(read_hyperparameters(file_)) {
  const Hyperparameters& h = hyperparameters_;
  const FindTensor find = [this](const std::string& name) { return file_.find(name); };
  const auto linear = [&](const std::string& name, int in, int out) { return read_linear(path, find, name, in, out); };
  token_embd_ = linear("token_embd", h.n_embd, h.n_vocab);
  if (token_embd_.bias) throw FileError(path + ": tensor 'token_embd.bias': found one, expected an embedding without");
  output_norm_ = need_norm(file_, "output_norm.weight", h.n_embd);
  const int q_dim = h.n_head * h.head_dim, kv_dim = h.n_head_kv * h.head_dim;
  for (int i = 0; i < h.n_layer; ++i) {
    const std::string prefix = "blk." + std::to_string(i) + ".";
    layers_.push_back({
        .attn_norm = need_norm(file_, prefix + "attn_norm.weight", h.n_embd),
        .ffn_norm = need_norm(file_, prefix + "ffn_norm.weight", h.n_embd),
        .attn_q = linear(prefix + "attn_q", h.n_embd, q_dim),
        .attn_k = linear(prefix + "attn_k", h.n_embd, kv_dim),
        .attn_v = linear(prefix + "attn_v", h.n_embd, kv_dim),
        .attn_output = linear(prefix + "attn_output", q_dim, h.n_embd),
        .ffn_gate = linear(prefix + "ffn_gate", h.n_embd, h.n_ff),
        .ffn_up = linear(prefix + "ffn_up", h.n_embd, h.n_ff),
        .ffn_down = linear(prefix + "ffn_down", h.n_ff, h.n_embd),
    });
  }
  tied_ = !has_linear(find, "output");
  output_ = tied_ ? token_embd_ : linear("output", h.n_embd, h.n_vocab);
  output_.name = "output";
}

size_t Model::layer_bytes(int layer) const { return bytes_of_tensors("blk." + std::to_string(layer) + "."); }

size_t Model::embedding_bytes() const { return bytes_of_tensors("token_embd."); }

size_t Model::output_bytes() const {
  return output_norm_.bytes + (tied_ ? embedding_bytes() : bytes_of_tensors("output."));
}

size_t Model::bytes_of_tensors(const std::string& prefix) const {
  size_t bytes = 0;
  const auto& tensors = file_.tensors();
  for (auto it = tensors.lower_bound(prefix); it != tensors.end() && it->first.starts_with(prefix); ++it)
    bytes += it->second.bytes;
  return bytes;
}

std::vector<const LinearWeights*> Model::linear_layers() const {
  std::vector<const LinearWeights*> all;
  for (const LayerWeights& layer : layers_)
    for (const LinearWeights* linear : layer.linear_layers()) all.push_back(linear);
  all.push_back(&output_);
  return all;
}

}  // namespace vptq
