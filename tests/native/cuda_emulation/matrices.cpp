#include "matrices.h"

#include <cstring>

#include "block.h"
#include "half.h"

namespace vptq::cuda::emulation {

namespace {

// Lane l has, of each 8x8 matrix, row l / 4's elements 2 (l % 4) and the next one.
constexpr int kLanesPerRow = 4;

const uint16_t* checked_row(const uint16_t* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("load_matrices of a row that is not aligned to 16 bytes");
  return row;
}

}  // namespace

// a (16, 16) is four 8x8 matrices: rows 0 to 7 and 8 to 15 of columns 0 to 7, then of columns 8 to 15. b (16, 8) is
// two, transposed: a lane's elements are neighbours in a column.
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    float a[4][2], b[2][2];
  };
  static_assert(sizeof(Fragments) <= kDepositBytes);
  Fragments own;
  for (int i = 0; i < 4; ++i) {
    own.a[i][0] = half_to_float(static_cast<uint16_t>(a[i]));
    own.a[i][1] = half_to_float(static_cast<uint16_t>(a[i] >> 16));
  }
  for (int i = 0; i < 2; ++i) {
    own.b[i][0] = half_to_float(static_cast<uint16_t>(b[i]));
    own.b[i][1] = half_to_float(static_cast<uint16_t>(b[i] >> 16));
  }
  const std::byte* all = exchange("mma_f16", &own, sizeof(own));
  const auto of = [&](int lane) {
    return reinterpret_cast<const Fragments*>(all + static_cast<size_t>(lane) * kDepositBytes);
  };
  const int row = lane() / kLanesPerRow, column = lane() % kLanesPerRow * 2;
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;
      sum += of(row * kLanesPerRow + from)->a[i / 2 + k / 8 * 2][k % 2] *
             of((column + i % 2) * kLanesPerRow + from)->b[k / 8][k % 2];
    }
    d[i] += sum;
  }
}

void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  const std::byte* all = exchange("load_matrices", checked_row(row), 16);
  for (int i = 0; i < 4; ++i) {
    const int from = i * 8 + lane() / kLanesPerRow;
    std::memcpy(&r[i], all + static_cast<size_t>(from) * kDepositBytes + lane() % kLanesPerRow * 4, 4);
  }
}

void load_matrices_transposed(uint32_t (&r)[4], const uint16_t* row) {
  const std::byte* all = exchange("load_matrices_transposed", checked_row(row), 16);
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int from = i * 8 + lane() % kLanesPerRow * 2 + j;
      std::memcpy(&pair[j], all + static_cast<size_t>(from) * kDepositBytes + lane() / kLanesPerRow * 2, 2);
    }
    r[i] = pair[0] | uint32_t{pair[1]} << 16;
  }
}

}  // namespace vptq::cuda::emulation
