// The Python module vptq_runtime._native; vptq_runtime/_native.pyi documents it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
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
#include "vptq/context.h"
#include "vptq/error.h"

namespace nb = nanobind;

namespace {

using vptq::Context;
using vptq::Model;
using vptq::Sampler;
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
  for (const vptq::LinearWeights* layer : model.linear_layers())
    if (layer->name == name) return vptq::bindings::dequantized(*layer);
  throw vptq::OptionError(model.file().path() + ": no linear layer '" + name + "'");
}

using Tokens = std::vector<int32_t>;

int32_t sample_candidates(Sampler& sampler, const Tokens& tokens, const std::vector<float>& logits) {
  if (tokens.size() != logits.size()) throw vptq::OptionError("expected as many logits as tokens");
  std::vector<vptq::Candidate> candidates;
  for (size_t i = 0; i < tokens.size(); ++i) candidates.push_back({tokens[i], logits[i]});
  return sampler.sample(candidates);
}

std::vector<vptq::Feed> feeds(const std::vector<int>& sequences, const std::vector<Tokens>& tokens) {
  if (sequences.size() != tokens.size())
    throw vptq::OptionError(std::to_string(tokens.size()) +
                            " token lists, expected one a sequence: " + std::to_string(sequences.size()));
  std::vector<vptq::Feed> out;
  for (size_t i = 0; i < sequences.size(); ++i) out.push_back({sequences[i], tokens[i]});
  return out;
}

std::vector<int32_t> step(Context& context, const std::vector<int>& sequences, const std::vector<Tokens>& tokens,
                          const std::vector<Sampler*>& samplers, const std::vector<bool>& prompts) {
  std::vector<vptq::Feed> steps = feeds(sequences, tokens);
  if (!prompts.empty() && prompts.size() != steps.size())
    throw vptq::OptionError(std::to_string(prompts.size()) +
                            " prompts, expected one flag a sequence: " + std::to_string(steps.size()));
  for (size_t i = 0; i < steps.size(); ++i) steps[i].prompt = !prompts.empty() && prompts[i];
  std::vector<int32_t> out(sequences.size());
  context.step(steps, samplers, out.data());
  return out;
}

void prefill(Context& context, const std::vector<int>& sequences, const std::vector<Tokens>& tokens) {
  context.prefill(feeds(sequences, tokens));
}

LogitsOut logits(Context& context, int sequence, const Tokens& tokens) {
  const size_t n_vocab = context.model().hyperparameters().n_vocab;
  LogitsOut out = vptq::bindings::new_array(tokens.size(), n_vocab);
  const nb::gil_scoped_release release;
  context.logits({sequence, tokens}, out.data());
  return out;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::register_exception_translator(translate);
  const nb::call_guard<nb::gil_scoped_release> no_gil;
  m.attr("version") = VPTQ_VERSION;
  m.attr("interface") = VPTQ_INTERFACE;

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

  nb::class_<Sampler>(m, "Sampler")
      .def(
          "__init__",
          [](Sampler* self, float temperature, int top_k, float top_p, float min_p, float repeat_penalty,
             uint64_t seed) { new (self) Sampler({temperature, top_k, top_p, min_p, repeat_penalty, seed}); },
          nb::kw_only(), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
          nb::arg("repeat_penalty"), nb::arg("seed"))
      .def(
          "accept", [](Sampler& self, const Tokens& tokens) { self.accept(tokens); }, nb::arg("tokens"))
      .def(
          "sample", [](Sampler& self, const LogitsIn& logits) { return self.sample({logits.data(), logits.size()}); },
          nb::arg("logits"))
      .def("sample_candidates", sample_candidates, nb::arg("tokens"), nb::arg("logits"))
      .def_prop_ro("n_candidates", &Sampler::n_candidates)
      .def_prop_ro("penalised_tokens", [](const Sampler& self) {
        return Tokens(self.penalised_tokens().begin(), self.penalised_tokens().end());
      });

  nb::class_<Context>(m, "Context")
      .def(
          "__init__",
          [](Context* self, std::shared_ptr<Model> model, const std::string& device, int gpu_layers, int n_ctx,
             int n_threads, const std::string& kv_type, const std::string& precision, const nb::object& progress) {
            vptq::ContextOptions options{device, gpu_layers, n_ctx, n_threads, kv_type, precision, {}};
            if (!progress.is_none())
              options.progress = [&](int done, int all) {
                const nb::gil_scoped_acquire acquire;
                progress(done, all);
              };
            const nb::gil_scoped_release release;
            new (self) Context(std::move(model), options);
          },
          nb::arg("model"), nb::kw_only(), nb::arg("device"), nb::arg("gpu_layers") = -1, nb::arg("n_ctx"),
          nb::arg("n_threads"), nb::arg("kv_type"), nb::arg("precision") = "auto", nb::arg("progress") = nb::none())
      .def_prop_ro("device", &Context::device)
      .def_prop_ro("why_not_cuda", &Context::why_not_cuda)
      .def_prop_ro("available_memory", &Context::available_memory)
      .def_prop_ro("n_ctx", &Context::n_ctx)
      .def_prop_ro("n_batch", &Context::n_batch)
      .def("new_sequence", &Context::new_sequence, nb::arg("n_tokens"), no_gil)
      .def("free_sequence", &Context::free_sequence, nb::arg("sequence"))
      .def("reserve", &Context::reserve, nb::arg("sequence"), nb::arg("n_tokens"), no_gil)
      .def("truncate", &Context::truncate, nb::arg("sequence"), nb::arg("n_tokens"))
      .def("length", &Context::length, nb::arg("sequence"))
      .def("prefill", prefill, nb::arg("sequences"), nb::arg("tokens"), no_gil)
      .def("step", step, nb::arg("sequences"), nb::arg("tokens"), nb::arg("samplers"),
           nb::arg("prompts") = std::vector<bool>(), no_gil)
      .def("logits", logits, nb::arg("sequence"), nb::arg("tokens"));

  nb::class_<vptq::Backend>(m, "Gpu")
      .def(nb::new_([] {
        const nb::gil_scoped_release release;
        return vptq::make_cuda_backend(0);
      }))
      .def_prop_ro("description", &vptq::Backend::description)
      .def_prop_ro("total_memory", &vptq::Backend::total_memory)
      .def_prop_ro("available_memory", &vptq::Backend::available_memory)
      .def("copy_bandwidth", &vptq::Backend::copy_bandwidth, no_gil);

  m.def("cpu_isas", vptq::cpu::available_isas);
  m.def("physical_cores", vptq::cpu::physical_cores);
  m.def("available_memory", vptq::cpu::available_memory);
  m.def("return_freed_memory", vptq::cpu::return_freed_memory);
  vptq::bindings::bind_operations(m);
}
