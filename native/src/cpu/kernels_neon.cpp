// The kernels for one instruction set; see kernels_table.h.
#include <arm_neon.h>

#include "cpu/kernels.h"

namespace vptq::cpu {
namespace {

#include "cpu/scalar.h"
// The order matters from here on.
// clang-format off
#include "cpu/vec_compose.h"
#include "cpu/vec_neon.h"
constexpr int kSumVectors = 12, kWeightVectors = 2;  // that fit the registers beside each other
constexpr bool kI16Pays = false;                     // no more products at once than in float32
#include "cpu/kernels_table.h"
// clang-format on

}  // namespace

extern const Kernels kernels_neon;
const Kernels kernels_neon = make_kernels("neon");

}  // namespace vptq::cpu
