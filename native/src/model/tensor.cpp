#include "vptq/tensor.h"

#include <bit>
#include <cstring>

namespace vptq {

size_t bytes_of(DType type, size_t n) {
  const TypeLayout layout = layout_of(type);
  return n / layout.block * layout.block_bytes;
}

bool is_float(DType type) { return type == DType::f32 || type == DType::f16 || type == DType::bf16; }

bool is_matrix_type(DType type) { return layout_of(type).name && type != DType::i16 && type != DType::i32; }

std::string type_name(DType type) {
  const char* name = layout_of(type).name;
  return name ? name : "number " + std::to_string(static_cast<uint32_t>(type));
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = float(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(subnormal));
}

void to_float(DType type, const std::byte* data, size_t n, float* out) {
  if (type == DType::f32) {
    std::memcpy(out, data, n * sizeof(float));
    return;
  }
  for (size_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, data + 2 * i, 2);
    out[i] = type == DType::f16 ? half_to_float(bits) : std::bit_cast<float>(uint32_t(bits) << 16);
  }
}

}  // namespace vptq
