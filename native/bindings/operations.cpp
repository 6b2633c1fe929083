#include "bindings/operations.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <chrono>
#include <memory>

#include "cpu/cpu_backend.h"
#include "kv_cache.h"
#include "vptq/error.h"

namespace nb = nanobind;

namespace vptq::bindings {
namespace {

using In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
// A tensor as the file would hold it: its GGUF type number, its shape and its bytes.
using RawTensor = nb::tuple;
using RawTensors = std::map<std::string, RawTensor>;

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

class Operations {
 public:
  Operations(const std::string& isa, int n_threads) : backend_(n_threads, isa) {}

  Array2 linear(const RawTensors& tensors, int out_features, const In& x, int n_i16) {
    expect(x.ndim() == 2 && x.shape(0) >= 1, "x: expected shape (n, in_features)");
    expect(n_i16 >= 0 && size_t(n_i16) <= x.shape(0), "n_i16: expected 0 to n");
    const Layer layer(tensors, int(x.shape(1)), out_features);
    const auto ready = backend_.linear(layer.weights(), n_i16 > 0);
    Array2 y = new_array(x.shape(0), out_features);
    backend_.apply({{*ready, y.data()}}, x.data(), int(x.shape(0)), n_i16);
    return y;
  }

  // Seconds of each repetition, the layer being read once.
  std::vector<double> time_linear(const RawTensors& tensors, int out_features, const In& x, int repetitions) {
    expect(x.ndim() == 2 && x.shape(0) >= 1, "x: expected shape (n, in_features)");
    const Layer layer(tensors, int(x.shape(1)), out_features);
    const auto ready = backend_.linear(layer.weights(), false);
    const Array2 y = new_array(x.shape(0), out_features);
    std::vector<double> seconds;
    for (int i = 0; i < repetitions; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      backend_.apply({{*ready, y.data()}}, x.data(), int(x.shape(0)), 0);
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return seconds;
  }

  // Three layers on the same x.
  std::array<Array2, 3> linears(const std::array<RawTensors, 3>& tensors, const std::array<int, 3>& out, const In& x) {
    expect(x.ndim() == 2 && x.shape(0) >= 1, "x: expected shape (n, in_features)");
    const int n = int(x.shape(0)), in = int(x.shape(1));
    const Layer a(tensors[0], in, out[0]), b(tensors[1], in, out[1]), c(tensors[2], in, out[2]);
    const auto la = backend_.linear(a.weights(), false), lb = backend_.linear(b.weights(), false),
               lc = backend_.linear(c.weights(), false);
    std::array<Array2, 3> y{new_array(n, out[0]), new_array(n, out[1]), new_array(n, out[2])};
    backend_.apply({{*la, y[0].data()}, {*lb, y[1].data()}, {*lc, y[2].data()}}, x.data(), n, 0);
    return y;
  }

  Array2 embed(const RawTensor& table, const std::vector<int32_t>& tokens) {
    const Tensor t = to_tensor("table", table);
    Batch batch;
    batch.tokens = tokens;
    Array2 x = new_array(tokens.size(), t.shape[1]);
    backend_.embed(batch, t, x.data());
    return x;
  }

  Array2 rms_norm(const In& x, const In& weight, float eps) {
    expect(x.ndim() == 2 && weight.size() == x.shape(1), "expected x (n, d), weight (d)");
    Array2 out = new_array(x.shape(0), x.shape(1));
    backend_.rms_norm(x.data(), int(x.shape(0)), int(x.shape(1)), weight.data(), eps, out.data());
    return out;
  }

  Array2 swiglu(const In& gate, const In& up) {
    expect(gate.ndim() == 2 && up.size() == gate.size(), "expected gate and up of one shape (n, d)");
    Array2 out = new_array(gate.shape(0), gate.shape(1));
    std::copy(gate.data(), gate.data() + gate.size(), out.data());
    backend_.swiglu(out.data(), up.data(), gate.size());
    return out;
  }

  // x (n, n_head * head_dim), one position a row
  Array2 rope(const In& x, int n_head, const std::vector<int32_t>& positions, const std::vector<float>& inv_freq) {
    expect(x.ndim() == 2 && positions.size() == x.shape(0) && x.shape(1) == 2 * inv_freq.size() * n_head,
           "expected x (n, n_head * head_dim), n positions, head_dim / 2 frequencies");
    Batch batch;
    batch.tokens = batch.positions = positions;
    Array2 out = new_array(x.shape(0), x.shape(1));
    std::copy(x.data(), x.data() + x.size(), out.data());
    backend_.rope(batch, n_head, int(2 * inv_freq.size()), inv_freq.data(), out.data());
    return out;
  }

  // Causal attention of the last n of the tokens whose keys and values are given.
  // q (n, n_head * head_dim); k, v (n_tokens, n_head_kv * head_dim)
  Array2 attention(const In& q, const In& k, const In& v, int n_head, int n_head_kv, int window,
                   const std::string& kv_type) {
    expect(q.ndim() == 2 && k.ndim() == 2 && v.size() == k.size() && n_head_kv > 0 && n_head % n_head_kv == 0 &&
               q.shape(1) / n_head == k.shape(1) / n_head_kv && q.shape(0) <= k.shape(0),
           "expected q (n, n_head * head_dim), k and v (n_tokens, n_head_kv * head_dim), n <= n_tokens");
    const int n = int(q.shape(0)), n_tokens = int(k.shape(0)), head_dim = int(q.shape(1)) / n_head;
    // The second of two layers, so that a wrong layer's offset shows.
    const KvLayout layout{2, n_head_kv, head_dim,
                          kv_type == "q8_0"  ? DType::q8_0
                          : kv_type == "f32" ? DType::f32
                                             : DType::f16};
    expect(layout.type != DType::q8_0 || head_dim % kQ8Block == 0, "q8_0: expected head_dim a multiple of 32");
    KvCache cache(backend_, layout, n_tokens);
    const int id = cache.new_sequence(n_tokens);
    Batch batch = batch_of(cache.blocks(id), 0, n_tokens);
    backend_.store_kv(batch, layout, 1, k.data(), v.data());
    batch = batch_of(cache.blocks(id), n_tokens - n, n);
    Array2 out = new_array(n, q.shape(1));
    backend_.attention(batch, layout, 1, n_head, window, q.data(), out.data());
    return out;
  }

 private:
  static Batch batch_of(const std::vector<std::byte*>& blocks, int first, int n) {
    Batch batch;
    for (int i = 0; i < n; ++i) batch.positions.push_back(first + i);
    batch.tokens = batch.positions;
    batch.sequences.assign(n, 0);
    batch.first_block = {0};
    batch.blocks = blocks;
    return batch;
  }

  cpu::CpuBackend backend_;
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

void bind_operations(nb::module_& m) {
  nb::class_<Operations>(m, "Operations")
      .def(nb::init<const std::string&, int>(), nb::arg("isa"), nb::arg("n_threads"))
      .def("linear", &Operations::linear, nb::arg("tensors"), nb::arg("out_features"), nb::arg("x"),
           nb::arg("n_i16") = 0)
      .def("time_linear", &Operations::time_linear, nb::arg("tensors"), nb::arg("out_features"), nb::arg("x"),
           nb::arg("repetitions"))
      .def("linears", &Operations::linears, nb::arg("tensors"), nb::arg("out_features"), nb::arg("x"))
      .def("embed", &Operations::embed, nb::arg("table"), nb::arg("tokens"))
      .def("rms_norm", &Operations::rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"))
      .def("swiglu", &Operations::swiglu, nb::arg("gate"), nb::arg("up"))
      .def("rope", &Operations::rope, nb::arg("x"), nb::arg("n_head"), nb::arg("positions"), nb::arg("inv_freq"))
      .def("attention", &Operations::attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("n_head"),
           nb::arg("n_head_kv"), nb::arg("window"), nb::arg("kv_type"))
      .def_static(
          "dequantize",
          [](const RawTensors& tensors, int in_features, int out_features) {
            return dequantized(Layer(tensors, in_features, out_features).weights());
          },
          nb::arg("tensors"), nb::arg("in_features"), nb::arg("out_features"));
}

}  // namespace vptq::bindings
