#include "bindings/operations.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <deque>
#include <memory>

#include "backend.h"
#include "context/kv_cache.h"
#include "context/placement.h"
#include "cpu/cpu_backend.h"
#include "self_check/self_check.h"
#include "vptq/error.h"

namespace nb = nanobind;

namespace vptq::bindings {
namespace {

using In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
// A tensor as the file would hold it: its GGUF type number, its shape and its bytes.
using RawTensor = nb::tuple;
using RawTensors = std::map<std::string, RawTensor>;

constexpr int kWarmUps = 3;  // steps until a backend has all the memory it wants and has recorded them
constexpr int kPasses = 4;   // a step: waiting for its end should not count

void expect(bool condition, const char* what) {
  if (!condition) throw OptionError(what);
}

Tensor to_tensor(const std::string& name, const RawTensor& raw) {
  Tensor t;
  t.name = name;
  t.type = static_cast<DType>(nb::cast<uint32_t>(raw[0]));
  t.shape = nb::cast<std::vector<int64_t>>(raw[1]);
  const auto bytes = nb::cast<nb::bytes>(raw[2]);
  t.data = static_cast<const std::byte*>(bytes.data());
  t.bytes = bytes.size();
  return t;
}

// The tensors of one layer, by the names that docs/file-format.md gives them ("weight", "vptq_indices", "bias" ...).
class Layer {
 public:
  Layer(const RawTensors& raw, int in_features, int out_features) {
    for (const auto& [suffix, tensor] : raw) tensors_["layer." + suffix] = to_tensor("layer." + suffix, tensor);
    const FindTensor find = [this](const std::string& name) {
      const auto it = tensors_.find(name);
      return it == tensors_.end() ? nullptr : &it->second;
    };
    weights_ = read_linear("arrays", find, "layer", in_features, out_features);
  }
  const LinearWeights& weights() const { return weights_; }

 private:
  std::map<std::string, Tensor> tensors_;
  LinearWeights weights_;
};

// Arrays in a backend's memory: what they hold at the beginning, and what is there at the end.
class Arrays {
 public:
  explicit Arrays(Backend& backend) : backend_(backend) {}

  float* make(size_t n) { return reinterpret_cast<float*>(backend_.allocate(n * sizeof(float), "an array")); }
  float* copy(const float* host, size_t n) {
    float* out = make(n);
    backend_.write(reinterpret_cast<std::byte*>(out), host, n * sizeof(float));
    return out;
  }
  float* copy(const In& x) { return copy(x.data(), x.size()); }
  Array2 read(const float* from, size_t rows, size_t columns) {
    Array2 out = new_array(rows, columns);
    backend_.read(reinterpret_cast<const std::byte*>(from), out.data(), out.size() * sizeof(float));
    return out;
  }

 private:
  Backend& backend_;
};

Batch batch_of(const std::vector<int32_t>& tokens) {
  Batch batch;
  batch.tokens = batch.positions = tokens;
  batch.sequences.assign(tokens.size(), 0);
  batch.first_block = {0};
  return batch;
}

Batch batch_of(const std::vector<std::byte*>& blocks, int first, int n) {
  std::vector<int32_t> positions;
  for (int i = 0; i < n; ++i) positions.push_back(first + i);
  Batch batch = batch_of(positions);
  batch.blocks = blocks;
  return batch;
}

class Operations {
 public:
  Operations(const std::string& isa, int n_threads)
      : backend_(isa == "cuda" ? make_cuda_backend(0) : std::make_unique<cpu::CpuBackend>(n_threads, isa)),
        arrays_(*backend_) {}

  Array2 linear(const RawTensors& tensors, int out_features, const In& x, int n_prompt) {
    expect(x.ndim() == 2 && x.shape(0) >= 1, "x: expected shape (n, in_features)");
    expect(n_prompt >= 0 && size_t(n_prompt) <= x.shape(0), "n_prompt: expected 0 to n");
    const Layer layer(kept(tensors), int(x.shape(1)), out_features);
    const auto ready = backend_->linear(layer.weights(), n_prompt > 0);
    float* y = arrays_.make(x.shape(0) * out_features);
    backend_->apply({{*ready, y}}, arrays_.copy(x), int(x.shape(0)), n_prompt);
    return arrays_.read(y, x.shape(0), out_features);
  }

  // Seconds that one of these layers takes, in each repetition: a step that goes through all of them kPasses times.
  std::vector<double> time_linear(const std::vector<RawTensors>& tensors, int out_features, const In& x,
                                  int repetitions, int n_prompt) {
    expect(x.ndim() == 2 && x.shape(0) >= 1, "x: expected shape (n, in_features)");
    expect(n_prompt >= 0 && size_t(n_prompt) <= x.shape(0), "n_prompt: expected 0 to n");
    expect(!tensors.empty(), "tensors: expected one layer at least");
    const int n = int(x.shape(0));
    std::deque<Layer> layers;
    std::vector<std::unique_ptr<Linear>> ready;
    for (const RawTensors& raw : tensors) {
      layers.emplace_back(kept(raw), int(x.shape(1)), out_features);
      ready.push_back(backend_->linear(layers.back().weights(), n_prompt > 0));
    }
    const float* in = arrays_.copy(x);
    float* y = arrays_.make(size_t(n) * out_features);
    Batch batch = batch_of({0}), outputs;  // no layer looks at it: one generated token, as backends record them
    batch.outputs = {0};
    outputs.take_outputs_of(batch);
    const auto all = [&](float*) {
      for (int i = 0; i < kPasses; ++i)
        for (const auto& layer : ready) backend_->apply({{*layer, y}}, in, n, n_prompt);
    };
    std::vector<double> seconds;
    for (int i = -kWarmUps; i < repetitions; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      backend_->forward(batch, outputs, {}, nullptr, true, all);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      if (i >= 0) seconds.push_back(taken.count() / double(kPasses * ready.size()));
    }
    return seconds;
  }

  // Three layers on the same x.
  std::array<Array2, 3> linears(const std::array<RawTensors, 3>& tensors, const std::array<int, 3>& out, const In& x,
                                int n_prompt) {
    expect(x.ndim() == 2 && x.shape(0) >= 1, "x: expected shape (n, in_features)");
    expect(n_prompt >= 0 && size_t(n_prompt) <= x.shape(0), "n_prompt: expected 0 to n");
    const int n = int(x.shape(0)), in = int(x.shape(1));
    const Layer a(kept(tensors[0]), in, out[0]), b(kept(tensors[1]), in, out[1]), c(kept(tensors[2]), in, out[2]);
    const auto ready = [&](const Layer& layer) { return backend_->linear(layer.weights(), n_prompt > 0); };
    const auto la = ready(a), lb = ready(b), lc = ready(c);
    float *ya = arrays_.make(n * out[0]), *yb = arrays_.make(n * out[1]), *yc = arrays_.make(n * out[2]);
    backend_->apply({{*la, ya}, {*lb, yb}, {*lc, yc}}, arrays_.copy(x), n, n_prompt);
    return {arrays_.read(ya, n, out[0]), arrays_.read(yb, n, out[1]), arrays_.read(yc, n, out[2])};
  }

  Array2 embed(const RawTensors& tensors, int in_features, int out_features, const std::vector<int32_t>& tokens) {
    const Layer layer(kept(tensors), in_features, out_features);
    for (const int32_t token : tokens) expect(token >= 0 && token < out_features, "expected tokens below out_features");
    const auto table = backend_->table(layer.weights());
    float* x = arrays_.make(tokens.size() * in_features);
    step(batch_of(tokens), [&](const Batch& batch) { backend_->embed(batch, *table, x); });
    return arrays_.read(x, tokens.size(), in_features);
  }

  Array2 rms_norm(const In& x, const In& weight, float eps) {
    expect(x.ndim() == 2 && weight.size() == x.shape(1), "expected x (n, d), weight (d)");
    float* out = arrays_.make(x.size());
    backend_->rms_norm(arrays_.copy(x), int(x.shape(0)), int(x.shape(1)), arrays_.copy(weight), eps, out);
    return arrays_.read(out, x.shape(0), x.shape(1));
  }

  Array2 swiglu(const In& gate, const In& up) {
    expect(gate.ndim() == 2 && up.size() == gate.size(), "expected gate and up of one shape (n, d)");
    float* out = arrays_.copy(gate);
    backend_->swiglu(out, arrays_.copy(up), gate.size());
    return arrays_.read(out, gate.shape(0), gate.shape(1));
  }

  // Of each row of logits (n, n_vocab): the n_largest, in any order, and those of tokens (n, n_tokens), as pairs of
  // token and logit.
  std::vector<std::vector<std::pair<int32_t, float>>> top_logits(const In& logits, int n_largest,
                                                                 const std::vector<std::vector<int32_t>>& tokens) {
    expect(backend_->max_top_logits() > 0, "this backend finds no largest logits");
    expect(logits.ndim() == 2 && n_largest >= 1 && n_largest <= backend_->max_top_logits() &&
               size_t(n_largest) <= logits.shape(1) && !tokens.empty() && tokens.size() == logits.shape(0),
           "expected logits (n, n_vocab), n_largest from 1 to n_vocab, n lists of tokens");
    const int n = int(logits.shape(0)), n_vocab = int(logits.shape(1));
    TopLogits top{n_vocab, n_largest, int(tokens[0].size()), {}, {}};
    for (const auto& row : tokens) top.tokens.insert(top.tokens.end(), row.begin(), row.end());
    expect(top.tokens.size() == size_t(n) * top.n_tokens, "expected as many tokens for each row");
    for (const int32_t token : top.tokens) expect(token >= 0 && token < n_vocab, "expected tokens below n_vocab");
    Batch batch = batch_of(std::vector<int32_t>(n)), outputs;
    batch.n_prompt = n;  // a prompt's step is not recorded
    for (int i = 0; i < n; ++i) batch.outputs.push_back(i);
    outputs.take_outputs_of(batch);
    const float* x = arrays_.copy(logits);
    backend_->forward(batch, outputs, {}, &top, true,
                      [&](float* out) { backend_->select_outputs(batch, n_vocab, x, out); });
    std::vector<std::vector<std::pair<int32_t, float>>> found(n);
    for (size_t i = 0; i < top.found.size(); ++i)
      found[i / top.row_size()].emplace_back(top.found[i].token, top.found[i].logit);
    return found;
  }

  // x (n, n_head * head_dim), one position a row
  Array2 rope(const In& x, int n_head, const std::vector<int32_t>& positions, const std::vector<float>& inv_freq) {
    expect(x.ndim() == 2 && positions.size() == x.shape(0) && x.shape(1) == 2 * inv_freq.size() * n_head,
           "expected x (n, n_head * head_dim), n positions, head_dim / 2 frequencies");
    float* out = arrays_.copy(x);
    const float* frequencies = arrays_.copy(inv_freq.data(), inv_freq.size());
    step(batch_of(positions),
         [&](const Batch& batch) { backend_->rope(batch, n_head, int(2 * inv_freq.size()), frequencies, out); });
    return arrays_.read(out, x.shape(0), x.shape(1));
  }

  // Causal attention of the last n of the tokens whose keys and values are given; all of them are parts of a prompt,
  // or generated.
  // q (n, n_head * head_dim); k, v (n_tokens, n_head_kv * head_dim)
  Array2 attention(const In& q, const In& k, const In& v, int n_head, int n_head_kv, int window,
                   const std::string& kv_type, bool prompt) {
    expect(q.ndim() == 2 && k.ndim() == 2 && v.size() == k.size() && n_head_kv > 0 && n_head % n_head_kv == 0 &&
               q.shape(1) / n_head == k.shape(1) / n_head_kv && q.shape(0) <= k.shape(0),
           "expected q (n, n_head * head_dim), k and v (n_tokens, n_head_kv * head_dim), n <= n_tokens");
    const int n = int(q.shape(0)), n_tokens = int(k.shape(0)), head_dim = int(q.shape(1)) / n_head;
    // The second of two layers, so that a wrong layer's offset shows.
    const KvLayout layout{2, n_head_kv, head_dim, kv_type_of(kv_type, head_dim)};
    KvCache cache({{*backend_, layout}}, n_tokens, KvLayout::blocks_for(n_tokens));
    const int id = cache.new_sequence({}), at_once = backend_->max_tokens();
    cache.reserve(id, n_tokens);
    std::vector<std::byte*> blocks;
    cache.append_memory(id, 0, blocks);
    const float *keys = arrays_.copy(k), *values = arrays_.copy(v), *queries = arrays_.copy(q);
    float* out = arrays_.make(q.size());
    for (int i = 0; i < n_tokens; i += at_once)
      step(batch_of(blocks, i, std::min(at_once, n_tokens - i)), [&](const Batch& batch) {
        backend_->store_kv(batch, layout, 1, keys + i * k.shape(1), values + i * k.shape(1));
      });
    for (int i = 0; i < n; i += at_once) {
      Batch batch = batch_of(blocks, n_tokens - n + i, std::min(at_once, n - i));
      if (prompt) batch.n_prompt = batch.n();
      step(batch, [&](const Batch& batch) {
        backend_->attention(batch, layout, 1, n_head, window, queries + i * q.shape(1), out + i * q.shape(1));
      });
    }
    return arrays_.read(out, n, q.shape(1));
  }

 private:
  // A backend may know weights by where they lie: as a model's, they outlive it.
  const RawTensors& kept(const RawTensors& tensors) { return kept_.emplace_back(tensors); }

  template <class Operation>
  void step(const Batch& batch, const Operation& operation) {
    Batch outputs;
    outputs.take_outputs_of(batch);
    backend_->forward(batch, outputs, {}, nullptr, true, [&](float*) { operation(batch); });
  }

  std::deque<RawTensors> kept_;
  std::unique_ptr<Backend> backend_;
  Arrays arrays_;
};

}  // namespace

Array2 new_array(size_t rows, size_t columns) {
  auto data = std::make_unique<float[]>(rows * columns);
  const nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return Array2(data.release(), {rows, columns}, owner);
}

Array2 dequantized(const LinearWeights& layer) {
  Array2 out = new_array(layer.out_features, layer.in_features);
  const nb::gil_scoped_release release;
  dequantize(layer, out.data());
  return out;
}

// How many of the last n_layers layers each GPU gets: placement.h's split() for what tests say of layers and memory.
std::vector<int> split_layers(const std::vector<double>& layers, double embedding, double output, double shared,
                              int n_layers, const std::vector<size_t>& free) {
  const int n_layer = int(layers.size());
  expect(n_layers >= 0 && n_layers <= n_layer, "n_layers: expected 0 to all");
  std::vector<int> out;
  for (const LayerRange range : split({layers, embedding, output, shared}, {n_layer - n_layers, n_layer}, free))
    out.push_back(range.size());
  return out;
}

// self_check.h's, with an instruction set of the CPU in the place of a GPU. Returns the seconds that it took.
double self_check_of(const Model& model, const std::string& isa, const std::string& kv_type, bool rounded,
                     int n_threads) {
  const Hyperparameters& h = model.hyperparameters();
  const KvLayout layout{h.n_layer, h.n_head_kv, h.head_dim, kv_type_of(kv_type, h.head_dim)};
  const nb::gil_scoped_release release;
  const auto begin = std::chrono::steady_clock::now();
  cpu::CpuBackend device(n_threads, isa);
  const auto cpu = make_cpu_backend(n_threads);
  self_check(device, *cpu, {model, {0, h.n_layer}, layout, rounded});
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  return taken.count();
}

void bind_operations(nb::module_& m) {
  m.def("self_check", self_check_of, nb::arg("model"), nb::kw_only(), nb::arg("isa"), nb::arg("kv_type"),
        nb::arg("rounded"), nb::arg("n_threads"));
  m.def("split_layers", split_layers, nb::kw_only(), nb::arg("layers"), nb::arg("embedding"), nb::arg("output"),
        nb::arg("shared"), nb::arg("n_layers"), nb::arg("free"));
  nb::class_<Operations>(m, "Operations")
      .def(nb::init<const std::string&, int>(), nb::arg("isa"), nb::arg("n_threads"))
      .def("linear", &Operations::linear, nb::arg("tensors"), nb::arg("out_features"), nb::arg("x"),
           nb::arg("n_prompt") = 0)
      .def("time_linear", &Operations::time_linear, nb::arg("tensors"), nb::arg("out_features"), nb::arg("x"),
           nb::arg("repetitions"), nb::arg("n_prompt") = 0)
      .def("linears", &Operations::linears, nb::arg("tensors"), nb::arg("out_features"), nb::arg("x"),
           nb::arg("n_prompt") = 0)
      .def("embed", &Operations::embed, nb::arg("tensors"), nb::arg("in_features"), nb::arg("out_features"),
           nb::arg("tokens"))
      .def("rms_norm", &Operations::rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"))
      .def("swiglu", &Operations::swiglu, nb::arg("gate"), nb::arg("up"))
      .def("top_logits", &Operations::top_logits, nb::arg("logits"), nb::arg("n_largest"), nb::arg("tokens"))
      .def("rope", &Operations::rope, nb::arg("x"), nb::arg("n_head"), nb::arg("positions"), nb::arg("inv_freq"))
      .def("attention", &Operations::attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("n_head"),
           nb::arg("n_head_kv"), nb::arg("window"), nb::arg("kv_type"), nb::arg("prompt") = false)
      .def_static(
          "dequantize",
          [](const RawTensors& tensors, int in_features, int out_features) {
            return dequantized(Layer(tensors, in_features, out_features).weights());
          },
          nb::arg("tensors"), nb::arg("in_features"), nb::arg("out_features"));
}

}  // namespace vptq::bindings
