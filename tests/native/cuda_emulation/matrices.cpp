#include "matrices.h"

#include <cstring>

#include "block.h"
#include "half.h"
#include "sanitizers.h"

namespace vptq::cuda::emulation {

namespace {

// Lane l has, of each 8x8 matrix, row l / 4's elements 2 (l % 4) and the next one.
constexpr int kLanesPerRow = 4;

// Replaces every lane's fragments of a and b by its fragment of their product. a (16, 16) is four 8x8 matrices: rows 0
// to 7 and 8 to 15 of columns 0 to 7, then of columns 8 to 15. b (16, 8) is two, transposed: a lane's elements are
// neighbours in a column. The product is two, one below the other.
void multiply(std::byte* deposits) {
  float a[16][16], b[16][8], d[16][8] = {};
  for (int l = 0; l < kLanes; ++l) {
    const int row = l / kLanesPerRow, pair = l % kLanesPerRow * 2;
    uint32_t fragments[6];
    std::memcpy(fragments, deposits + static_cast<size_t>(l) * kDepositBytes, sizeof(fragments));
    for (int j = 0; j < 2; ++j) {
      const auto element = [&](int i) { return half_to_float(static_cast<uint16_t>(fragments[i] >> 16 * j)); };
      for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][pair + j + i / 2 * 8] = element(i);
      for (int i = 0; i < 2; ++i) b[pair + j + i * 8][row] = element(4 + i);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    std::byte* to = deposits + static_cast<size_t>(l) * kDepositBytes;
    const int row = l / kLanesPerRow, pair = l % kLanesPerRow * 2;
    std::memcpy(to, &d[row][pair], 2 * sizeof(float));
    std::memcpy(to + 2 * sizeof(float), &d[row + 8][pair], 2 * sizeof(float));
  }
}

constexpr size_t kRowBytes = 16;

void check_row(const uint16_t* row, void* code) {
  if (reinterpret_cast<uintptr_t>(row) % kRowBytes) fail("load_matrices of a row that is not aligned to 16 bytes");
  note_read(row, kRowBytes, code);
}

}  // namespace

void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  static_assert(sizeof(own) <= kDepositBytes);
  const std::byte* all = exchange("mma_f16", own, sizeof(own), multiply);
  float product[4];
  std::memcpy(product, all + static_cast<size_t>(lane()) * kDepositBytes, sizeof(product));
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}

void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  check_row(row, __builtin_return_address(0));
  const std::byte* all = exchange("load_matrices", row, kRowBytes);
  for (int i = 0; i < 4; ++i) {
    const int from = i * 8 + lane() / kLanesPerRow;
    std::memcpy(&r[i], all + static_cast<size_t>(from) * kDepositBytes + lane() % kLanesPerRow * 4, 4);
  }
}

void load_matrices_transposed(uint32_t (&r)[4], const uint16_t* row) {
  check_row(row, __builtin_return_address(0));
  const std::byte* all = exchange("load_matrices_transposed", row, kRowBytes);
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
