// A tensor as it lies in the file: a type, a shape and a pointer into the mapping.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vptq {

// The numbers are GGUF's.
enum class DType : uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  i16 = 25,
  i32 = 26,
  bf16 = 30
};

// How a type lies in memory: `block` elements beside each other take block_bytes. Of a quantised type: the bits of q
// below, and whether there is an m.
struct TypeLayout {
  const char* name;
  int block, block_bytes;
  int bits = 0;
  bool has_min = false;
};

// Every quantised block has 32 weights and begins with d, f16. Weights of Q8_0 are d q, of int8. In the others q is
// unsigned: of Q4_0 and Q5_0 they are d (q - 8) and d (q - 16), of Q4_1 and Q5_1 d q + m, m being a second f16. Of the
// five bits of q the fifth ones come next, weight i's in bit i of four bytes; then the four lower ones of weights i and
// i + 16 in the halves of byte i, i < 16.
constexpr TypeLayout layout_of(DType type) {
  switch (type) {
    case DType::f32: return {"F32", 1, 4};
    case DType::f16: return {"F16", 1, 2};
    case DType::q4_0: return {"Q4_0", 32, 2 + 16, 4};
    case DType::q4_1: return {"Q4_1", 32, 2 + 2 + 16, 4, true};
    case DType::q5_0: return {"Q5_0", 32, 2 + 4 + 16, 5};
    case DType::q5_1: return {"Q5_1", 32, 2 + 2 + 4 + 16, 5, true};
    case DType::q8_0: return {"Q8_0", 32, 2 + 32, 8};
    case DType::i16: return {"I16", 1, 2};
    case DType::i32: return {"I32", 1, 4};
    case DType::bf16: return {"BF16", 1, 2};
  }
  return {nullptr, 1, 0};  // a file's number that is none of these
}

inline constexpr int kQ8Block = layout_of(DType::q8_0).block;
inline constexpr int kQ8BlockBytes = layout_of(DType::q8_0).block_bytes;

// The types that a matrix can have: calls use.template operator()<type>(). Not for I16 and I32, which are indices.
inline constexpr const char* kMatrixTypes = "F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0";
template <class Use>
auto with_matrix_type(DType type, const Use& use) {
  switch (type) {
    case DType::f16: return use.template operator()<DType::f16>();
    case DType::q4_0: return use.template operator()<DType::q4_0>();
    case DType::q4_1: return use.template operator()<DType::q4_1>();
    case DType::q5_0: return use.template operator()<DType::q5_0>();
    case DType::q5_1: return use.template operator()<DType::q5_1>();
    case DType::q8_0: return use.template operator()<DType::q8_0>();
    case DType::bf16: return use.template operator()<DType::bf16>();
    case DType::f32:
    case DType::i16:
    case DType::i32: break;
  }
  return use.template operator()<DType::f32>();
}

struct Tensor {
  std::string name;
  DType type = DType::f32;
  std::vector<int64_t> shape;  // row-major, slowest dimension first
  const std::byte* data = nullptr;
  size_t bytes = 0;
};

size_t bytes_of(DType type, size_t n);  // n elements take so many; whole blocks
bool is_float(DType type);              // F32, F16 or BF16
bool is_matrix_type(DType type);
std::string type_name(DType type);
std::string shape_text(const std::vector<int64_t>& shape);  // "(2, 512, 8)"

// Converts n elements of an F32, F16 or BF16 tensor to float, exactly.
void to_float(DType type, const std::byte* data, size_t n, float* out);

float half_to_float(uint16_t bits);

}  // namespace vptq
