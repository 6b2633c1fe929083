// Problems that two backends solve, and how far apart their numbers lie.
#pragma once

#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend.h"
#include "vptq/error.h"

namespace vptq {

// A backend, and the arrays of the problem at hand in its memory.
class Side {
 public:
  explicit Side(Backend& backend) : backend(backend) {}

  float* copy(const std::vector<float>& values);
  // For n results: NaN, so that what is left out shows.
  float* results(size_t n);
  void write(const std::vector<float>& values, float* to);
  std::vector<float> read(const float* from, size_t n);
  // Another problem can have the arrays: a backend gives no memory back.
  void forget() { n_used_ = 0; }

  // A step on a batch of which no logits are wanted; its blocks of the cache are these.
  void forward(Batch batch, const std::function<void(const Batch&)>& operations);
  std::vector<std::byte*> blocks;

  Backend& backend;

 private:
  struct Array {
    float* data;
    size_t n;
  };
  std::vector<Array> arrays_;  // the first n_used_ of them are the problem's
  size_t n_used_ = 0;
};

// A problem whose inputs are in the memory of a side.
struct Step {
  float* results;
  std::function<void(const Batch&)> operations;
  std::function<void()> change = [] {};  // puts other inputs in their place
};
using Problem = std::function<Step(Side&)>;

class Comparison {
 public:
  Comparison(Backend& device, Backend& cpu) : device(device), cpu(cpu) {}

  // Both throw DeviceError where more than `most` lies between n numbers of a problem, as relative L2 in float64, or
  // where the device fails. Numbers that are not finite on the CPU don't count, but not all of them may be.
  void check(const std::string& operation, double most, const Problem& problem, size_t n, const Batch& batch) {
    check(operation, most, problem, n, std::span(&batch, 1));
  }
  // The step is done on each of these batches of the same sizes, on the last one of several with the changed inputs:
  // its results count.
  void check(const std::string& operation, double most, const Problem& problem, size_t n, std::span<const Batch> plays);
  void expect(const std::string& operation, double most, std::span<const float> found,
              std::span<const float> expected) const;

  static std::vector<float> solve(Side& side, const Problem& problem, size_t n, std::span<const Batch> plays);

  // What is done on the device for an operation: its errors are the operation's. A lack of memory is no wrong number.
  template <class Work>
  auto attempt(const std::string& operation, const Work& work) const {
    try {
      return work();
    } catch (const OutOfMemoryError& e) {
      throw OutOfMemoryError(name(operation) + e.what());
    } catch (const Error& e) {
      fail(operation, e.what());
    }
  }
  [[noreturn]] void fail(const std::string& operation, const std::string& what) const;

  // From -size to size, the same ones every time.
  std::vector<float> numbers(size_t n, float size = 1);

  Side device, cpu;
  std::mt19937_64 random;

 private:
  std::string name(const std::string& operation) const;
};

}  // namespace vptq
