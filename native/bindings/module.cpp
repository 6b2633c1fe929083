// The Python module vptq_runtime._native; vptq_runtime/_native.pyi documents it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <new>

#include "backend.h"
#include "bindings/operations.h"
#include "cpu/kernels.h"
#include "cpu/machine.h"
#include "sampling/philox.h"
#include "vptq/context.h"
#include "vptq/error.h"

namespace nb = nanobind;

namespace {

using vptq::Context;
using vptq::Model;
using vptq::Sampler;
using MaskIn = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MasksIn = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using LogitsIn = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitsOut = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

// Sets the exception of vptq_runtime.errors that has this name. The message may hold a file's bytes: any at all.
void set_error(const char* name, const char* message) {
  const nb::object type = nb::module_::import_("vptq_runtime.errors").attr(name);
  const auto text = nb::steal(PyUnicode_DecodeUTF8(message, Py_ssize_t(std::strlen(message)), "replace"));
  PyErr_SetObject(type.ptr(), text.ptr());
}

void translate(const std::exception_ptr& p, void*) {
  try {
    std::rethrow_exception(p);
  } catch (const vptq::FileError& e) {
    set_error("FileError", e.what());
  } catch (const vptq::UnsupportedError& e) {
    set_error("UnsupportedError", e.what());
  } catch (const vptq::OptionError& e) {
    set_error("OptionError", e.what());
  } catch (const vptq::DeviceError& e) {
    set_error("DeviceError", e.what());
  } catch (const vptq::OutOfMemoryError& e) {
    set_error("OutOfMemoryError", e.what());
  } catch (const std::bad_alloc&) {
    set_error("OutOfMemoryError", "no memory left");
  }
}

nb::object to_python(const vptq::GgufValue& value);

nb::object to_python(const vptq::GgufArray& array) {
  nb::list list;
  for (const vptq::GgufValue& value : array) list.append(to_python(value));
  return list;
}

nb::object to_python(const vptq::GgufValue& value) {
  return std::visit(
      [](const auto& v) -> nb::object {
        using V = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<V, vptq::GgufArray>) {
          return to_python(v);
        } else if constexpr (std::is_same_v<V, std::string_view>) {
          return nb::steal(PyUnicode_DecodeUTF8(v.data(), Py_ssize_t(v.size()), "replace"));
        } else {
          return nb::cast(v);
        }
      },
      static_cast<const vptq::GgufValue::variant&>(value));
}

nb::list metadata_keys(const Model& model) {
  nb::list keys;
  for (const auto& [key, value] : model.file().metadata()) {
    const auto text = nb::steal(PyUnicode_DecodeUTF8(key.data(), Py_ssize_t(key.size()), nullptr));
    if (text.is_valid())
      keys.append(text);
    else
      PyErr_Clear();  // nobody could ask for its value
  }
  return keys;
}

nb::object metadata_value(const Model& model, const std::string& key) {
  const vptq::GgufValue* value = model.file().find_key(key);
  return value == nullptr ? nb::none() : to_python(*value);
}

nb::dict tensors(const Model& model) {
  nb::dict out;
  for (const auto& [name, tensor] : model.file().tensors())
    out[nb::steal(PyUnicode_DecodeUTF8(name.data(), Py_ssize_t(name.size()), "replace"))] =
        nb::make_tuple(tensor.shape, tensor.bytes);
  return out;
}

std::vector<std::string> linear_names(const Model& model) {
  std::vector<std::string> names;
  for (const vptq::LinearWeights* layer : model.linear_layers()) names.push_back(layer->name);
  return names;
}

LogitsOut dequantize(const Model& model, const std::string& name) {
  if (name == model.token_embd().name) return vptq::bindings::dequantized(model.token_embd());
  for (const vptq::LinearWeights* layer : model.linear_layers())
    if (layer->name == name) return vptq::bindings::dequantized(*layer);
  throw vptq::OptionError(model.file().path() + ": no linear layer '" + name + "'");
}

using Tokens = std::vector<int32_t>;

Tokens to_vector(std::span<const int32_t> tokens) { return {tokens.begin(), tokens.end()}; }

int32_t sample(Sampler& sampler, const LogitsIn& logits, const std::optional<MaskIn>& mask) {
  const std::span<const float> all(logits.data(), logits.size());
  if (!mask) return sampler.sample(all);
  if (mask->size() == 0) throw vptq::OptionError("mask: found no words, expected a bit for each token");
  return sampler.sample(all, {mask->data(), mask->size()});
}

int32_t sample_candidates(Sampler& sampler, const Tokens& tokens, const std::vector<float>& logits) {
  if (tokens.size() != logits.size()) throw vptq::OptionError("expected as many logits as tokens");
  std::vector<vptq::Candidate> candidates;
  for (size_t i = 0; i < tokens.size(); ++i) candidates.push_back({tokens[i], logits[i]});
  return sampler.sample(candidates);
}

// One list for each sequence, or none.
void expect_for_each(size_t n, const std::vector<int>& sequences, const char* what) {
  if (n != sequences.size())
    throw vptq::OptionError(std::to_string(n) + " " + what +
                            ", expected one a sequence: " + std::to_string(sequences.size()));
}

vptq::Want want(const std::string& name, size_t i) {
  for (const auto& [known, want] :
       {std::pair{"none", vptq::Want::none}, {"last", vptq::Want::last}, {"all", vptq::Want::all}})
    if (name == known) return want;
  throw vptq::OptionError("wants[" + std::to_string(i) + "]: found '" + name + "', expected none, last or all");
}

std::vector<vptq::Feed> feeds(const std::vector<int>& sequences, const std::vector<Tokens>& tokens,
                              const std::vector<bool>& prompts, const std::vector<std::string>& wants,
                              const std::vector<Sampler*>& samplers) {
  expect_for_each(tokens.size(), sequences, "token lists");
  if (!prompts.empty()) expect_for_each(prompts.size(), sequences, "prompts");
  if (!wants.empty()) expect_for_each(wants.size(), sequences, "wants");
  if (!samplers.empty()) expect_for_each(samplers.size(), sequences, "samplers");
  std::vector<vptq::Feed> out;
  for (size_t i = 0; i < sequences.size(); ++i)
    out.push_back({.sequence = sequences[i],
                   .tokens = tokens[i],
                   .prompt = !prompts.empty() && prompts[i],
                   .want = wants.empty() ? vptq::Want::last : want(wants[i], i),
                   .sampler = samplers.empty() ? nullptr : samplers[i]});
  return out;
}

void forward(Context& context, const std::vector<int>& sequences, const std::vector<Tokens>& tokens,
             const std::vector<bool>& prompts, const std::vector<std::string>& wants,
             const std::vector<Sampler*>& samplers) {
  context.forward(feeds(sequences, tokens, prompts, wants, samplers));
}

void begin(Context& context, const std::vector<int>& sequences, const std::vector<Tokens>& tokens,
           const std::vector<bool>& prompts, const std::vector<std::string>& wants,
           const std::vector<Sampler*>& samplers) {
  context.begin(feeds(sequences, tokens, prompts, wants, samplers));
}

std::vector<Tokens> sample_feeds(Context& context, const std::vector<Sampler*>& samplers,
                                 const std::vector<std::optional<MasksIn>>& masks) {
  const size_t n_words = vptq::mask_words(size_t(context.model().hyperparameters().n_vocab));
  std::vector<std::span<const int32_t>> spans;
  for (size_t i = 0; i < masks.size(); ++i) {
    spans.emplace_back();
    if (!masks[i]) continue;
    if (masks[i]->size() == 0 || masks[i]->shape(1) != n_words)
      throw vptq::OptionError("masks[" + std::to_string(i) + "]: found shape (" + std::to_string(masks[i]->shape(0)) +
                              ", " + std::to_string(masks[i]->shape(1)) + "), expected (wanted tokens, " +
                              std::to_string(n_words) + ")");
    spans.back() = {masks[i]->data(), masks[i]->size()};
  }
  std::vector<Tokens> out;
  context.sample(samplers, spans, out);
  return out;
}

std::pair<std::vector<double>, std::vector<std::vector<std::pair<int32_t, double>>>> log_probs(const Context& context,
                                                                                               int feed,
                                                                                               const Tokens& tokens,
                                                                                               int n_top) {
  vptq::LogProbs out = context.log_probs(feed, tokens, n_top);
  return {std::move(out.tokens), std::move(out.top)};
}

LogitsOut logits(const Context& context, int feed) {
  auto logits = std::make_unique<vptq::Logits>(context.logits(feed));
  const auto n_vocab = size_t(context.model().hyperparameters().n_vocab);
  float* data = logits->data.get();
  const size_t n = logits->n;
  const nb::capsule owner(logits.get(), [](void* p) noexcept { delete static_cast<vptq::Logits*>(p); });
  logits.release();
  return LogitsOut(data, {n, n_vocab}, owner);
}

using NoGil = nb::call_guard<nb::gil_scoped_release>;

void bind_model(nb::module_& m) {
  nb::class_<Model>(m, "Model")
      .def(
          "__init__",
          [](Model* self, const std::filesystem::path& path) {
            const nb::gil_scoped_release release;
            new (self) Model(path.string());
          },
          nb::arg("path"))
      .def("metadata_keys", metadata_keys)
      .def("metadata_value", metadata_value, nb::arg("key"))
      .def_prop_ro("file_bytes", [](const Model& model) { return model.file().bytes(); })
      .def_prop_ro("n_vocab", [](const Model& model) { return model.hyperparameters().n_vocab; })
      .def_prop_ro("n_ctx_train", [](const Model& model) { return model.hyperparameters().n_ctx_train; })
      .def_prop_ro("n_layer", [](const Model& model) { return model.hyperparameters().n_layer; })
      .def_prop_ro("tensors", tensors)
      .def("linear_names", linear_names)
      .def("dequantize", dequantize, nb::arg("name"));
}

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler")
      .def(
          "__init__",
          [](Sampler* self, float temperature, int top_k, float top_p, float min_p, float repeat_penalty, uint64_t seed,
             double presence_penalty, double frequency_penalty, const std::map<int32_t, double>& logit_bias,
             int64_t min_tokens, Tokens end_tokens) {
            new (self) Sampler({temperature,
                                top_k,
                                top_p,
                                min_p,
                                repeat_penalty,
                                seed,
                                presence_penalty,
                                frequency_penalty,
                                {logit_bias.begin(), logit_bias.end()},
                                min_tokens,
                                std::move(end_tokens)});
          },
          nb::kw_only(), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
          nb::arg("repeat_penalty"), nb::arg("seed"), nb::arg("presence_penalty") = 0.0,
          nb::arg("frequency_penalty") = 0.0, nb::arg("logit_bias") = std::map<int32_t, double>(),
          nb::arg("min_tokens") = 0, nb::arg("end_tokens") = Tokens())
      .def(
          "accept", [](Sampler& self, const Tokens& tokens, bool generated) { self.accept(tokens, generated); },
          nb::arg("tokens"), nb::arg("generated") = false)
      .def("sample", sample, nb::arg("logits"), nb::arg("mask") = nb::none(), NoGil())
      .def("sample_candidates", sample_candidates, nb::arg("tokens"), nb::arg("logits"))
      .def_prop_ro("n_generated", [](const Sampler& self) { return self.history().n_generated; })
      .def_prop_ro("n_candidates", [](const Sampler& self) { return self.n_candidates(); })
      .def_prop_ro("adjusted_tokens", [](const Sampler& self) {
        Tokens out;
        self.adjusted_tokens(out);
        return out;
      });
}

void bind_context(nb::module_& m) {
  nb::class_<Context>(m, "Context")
      .def(
          "__init__",
          [](Context* self, std::shared_ptr<Model> model, const std::string& device, int gpu_layers, int n_ctx,
             int n_threads, const std::string& kv_type, const std::string& precision, int64_t kv_tokens,
             const nb::object& progress) {
            vptq::ContextOptions options{device, gpu_layers, n_ctx, n_threads, kv_type, precision, kv_tokens, {}};
            if (!progress.is_none())
              options.progress = [&](int done, int all) {
                const nb::gil_scoped_acquire acquire;
                progress(done, all);
              };
            const nb::gil_scoped_release release;
            new (self) Context(std::move(model), options);
          },
          nb::arg("model"), nb::kw_only(), nb::arg("device"), nb::arg("gpu_layers") = -1, nb::arg("n_ctx"),
          nb::arg("n_threads"), nb::arg("kv_type"), nb::arg("precision") = "auto", nb::arg("kv_tokens") = 0,
          nb::arg("progress") = nb::none())
      .def_prop_ro("device", &Context::device)
      .def_prop_ro("why_not_cuda", &Context::why_not_cuda)
      .def_prop_ro("available_memory", &Context::available_memory)
      .def_prop_ro("n_ctx", &Context::n_ctx)
      .def_prop_ro("n_layer", &Context::n_layer)
      .def_prop_ro("n_batch", &Context::n_batch)
      .def_prop_ro("block_tokens", [](const Context&) { return Context::block_tokens(); })
      .def_prop_ro("n_blocks", &Context::n_blocks)
      .def_prop_ro("n_free_blocks", &Context::n_free_blocks)
      .def(
          "new_sequence", [](Context& self, const Tokens& prefix) { return self.new_sequence(prefix); },
          nb::arg("prefix") = Tokens())
      .def("free_sequence", &Context::free_sequence, nb::arg("sequence"))
      .def("truncate", &Context::truncate, nb::arg("sequence"), nb::arg("n_tokens"))
      .def("length", &Context::length, nb::arg("sequence"))
      .def(
          "blocks", [](const Context& self, int sequence) { return to_vector(self.blocks(sequence)); },
          nb::arg("sequence"))
      .def(
          "hold", [](Context& self, const Tokens& blocks) { self.hold(blocks); }, nb::arg("blocks"))
      .def(
          "release", [](Context& self, const Tokens& blocks) { self.release(blocks); }, nb::arg("blocks"))
      .def("forward", forward, nb::arg("sequences"), nb::arg("tokens"), nb::arg("prompts") = nb::tuple(),
           nb::arg("wants") = nb::tuple(), nb::arg("samplers") = nb::tuple(), NoGil())
      .def("begin", begin, nb::arg("sequences"), nb::arg("tokens"), nb::arg("prompts") = nb::tuple(),
           nb::arg("wants") = nb::tuple(), nb::arg("samplers") = nb::tuple(), NoGil())
      .def("advance", &Context::advance, nb::arg("n_layers"), NoGil())
      .def("abandon", &Context::abandon)
      .def("sample", sample_feeds, nb::arg("samplers"), nb::arg("masks") = nb::tuple(), NoGil())
      .def("log_probs", log_probs, nb::arg("feed"), nb::arg("tokens"), nb::arg("n_top"), NoGil())
      .def("logits", logits, nb::arg("feed"));
}

void bind_gpu(nb::module_& m) {
  nb::class_<vptq::Backend>(m, "Gpu")
      .def(nb::new_([] {
        const nb::gil_scoped_release release;
        return vptq::make_cuda_backend(0);
      }))
      .def_prop_ro("description", &vptq::Backend::description)
      .def_prop_ro("total_memory", &vptq::Backend::total_memory)
      .def_prop_ro("available_memory", &vptq::Backend::available_memory)
      .def("copy_bandwidth", &vptq::Backend::copy_bandwidth, NoGil());
}

}  // namespace

NB_MODULE(_native, m) {
  nb::register_exception_translator(translate);
  m.attr("version") = VPTQ_VERSION;
  m.attr("interface") = VPTQ_INTERFACE;
  bind_model(m);
  bind_sampler(m);
  bind_context(m);
  bind_gpu(m);
  m.def("philox", vptq::philox, nb::arg("counter"), nb::arg("key"));
  m.def("cpu_isas", vptq::cpu::available_isas);
  m.def("physical_cores", vptq::cpu::physical_cores);
  m.def("available_memory", vptq::cpu::available_memory);
  m.def("return_freed_memory", vptq::cpu::return_freed_memory);
  vptq::bindings::bind_operations(m);
}
