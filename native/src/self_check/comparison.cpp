#include "self_check/comparison.h"

#include <cmath>
#include <cstdio>
#include <limits>

namespace vptq {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1e", x);
  return text;
}

}  // namespace

float* Side::copy(const std::vector<float>& values) {
  size_t i = n_used_;
  while (i < arrays_.size() && arrays_[i].n < values.size()) ++i;
  if (i == arrays_.size()) {
    std::byte* data = backend.allocate(values.size() * sizeof(float), "a self-check");
    arrays_.push_back({reinterpret_cast<float*>(data), values.size()});
  }
  std::swap(arrays_[i], arrays_[n_used_]);
  write(values, arrays_[n_used_].data);
  return arrays_[n_used_++].data;
}

float* Side::results(size_t n) { return copy(std::vector<float>(n, kNaN)); }

void Side::write(const std::vector<float>& values, float* to) {
  backend.write(reinterpret_cast<std::byte*>(to), values.data(), values.size() * sizeof(float));
}

std::vector<float> Side::read(const float* from, size_t n) {
  std::vector<float> out(n);
  backend.read(reinterpret_cast<const std::byte*>(from), out.data(), n * sizeof(float));
  return out;
}

void Side::forward(Batch batch, const std::function<void(const Batch&)>& operations) {
  batch.blocks = blocks;
  Batch outputs;
  outputs.take_outputs_of(batch);
  backend.forward(batch, outputs, {}, nullptr, true, [&](float*) { operations(batch); });
}

std::vector<float> Comparison::solve(Side& side, const Problem& problem, size_t n, std::span<const Batch> plays) {
  side.forget();
  const Step step = problem(side);
  for (size_t i = 0; i < plays.size(); ++i) {
    if (i > 0) side.write(std::vector<float>(n, kNaN), step.results);
    if (i > 0 && i + 1 == plays.size()) step.change();
    side.forward(plays[i], step.operations);
  }
  return side.read(step.results, n);
}

void Comparison::check(const std::string& operation, double most, const Problem& problem, size_t n,
                       std::span<const Batch> plays) {
  const auto found = attempt(operation, [&] { return solve(device, problem, n, plays); });
  expect(operation, most, found, solve(cpu, problem, n, plays));
}

void Comparison::expect(const std::string& operation, double most, std::span<const float> found,
                        std::span<const float> expected) const {
  double error = 0, size = 0;
  size_t n_lost = 0, n_compared = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isfinite(expected[i])) continue;  // a model's rope frequencies can be too large
    ++n_compared;
    n_lost += !std::isfinite(found[i]);
    const double difference = double(found[i]) - double(expected[i]);
    error += difference * difference;
    size += double(expected[i]) * double(expected[i]);
  }
  if (n_compared == 0 && !expected.empty())
    fail(operation,
         "none of " + std::to_string(expected.size()) + " numbers is finite on the CPU, expected some to be");
  if (n_lost > 0)
    fail(operation, std::to_string(n_lost) + " of " + std::to_string(found.size()) +
                        " numbers are not finite, expected all of them to be");
  const double relative = error > 0 ? std::sqrt(error / size) : 0;
  if (relative > most)
    fail(operation, "found numbers that differ from the CPU's by " + number(relative) +
                        " (relative L2), expected at most " + number(most));
}

void Comparison::fail(const std::string& operation, const std::string& what) const {
  throw DeviceError(name(operation) + what);
}

std::string Comparison::name(const std::string& operation) const {
  return "device " + device.backend.description() + ": self-check of " + operation + ": ";
}

std::vector<float> Comparison::numbers(size_t n, float size) {
  std::vector<float> out(n);
  for (float& x : out) x = size * 0x1p-31f * float(int32_t(random()));
  return out;
}

}  // namespace vptq
