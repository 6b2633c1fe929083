// The kernels for one instruction set; see kernels_table.h.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace vptq::cpu {
namespace {

#include "cpu/scalar.h"
// The order matters from here on.
// clang-format off
#include "cpu/vec_compose.h"
#include "cpu/vec_avx2.h"
#include "cpu/vec_avx512.h"
constexpr int kSumVectors = 24, kWeightVectors = 4;  // that fit the registers beside each other
constexpr bool kI16Pays = true;
#include "cpu/kernels_table.h"
// clang-format on

}  // namespace

extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni = make_kernels("avx512vnni");

}  // namespace vptq::cpu
