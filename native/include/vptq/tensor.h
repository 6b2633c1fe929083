// A tensor as it lies in the file: a type, a shape and a pointer into the mapping.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vptq {

// The numbers are GGUF's.
enum class DType : uint32_t { f32 = 0, f16 = 1, q8_0 = 8, i16 = 25, i32 = 26, bf16 = 30 };

// Q8_0: blocks of 32 weights, one f16 scale and 32 int8.
inline constexpr int kQ8Block = 32;
inline constexpr int kQ8BlockBytes = 2 + kQ8Block;

struct Tensor {
  std::string name;
  DType type = DType::f32;
  std::vector<int64_t> shape;  // row-major, slowest dimension first
  const std::byte* data = nullptr;
  size_t bytes = 0;
};

size_t bytes_of(DType type, size_t n);  // n elements take so many; of Q8_0 whole blocks
std::string type_name(DType type);
std::string shape_text(const std::vector<int64_t>& shape);  // "(2, 512, 8)"

// Converts n elements of an F32, F16 or BF16 tensor to float, exactly.
void to_float(DType type, const std::byte* data, size_t n, float* out);

float half_to_float(uint16_t bits);

}  // namespace vptq
