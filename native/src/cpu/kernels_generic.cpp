// The kernels for one instruction set; see kernels_table.h.

#include "cpu/kernels.h"

namespace vptq::cpu {
namespace {

#include "cpu/scalar.h"
// The order matters from here on.
// clang-format off
#include "cpu/vec_generic.h"
constexpr int kSumVectors = 4, kWeightVectors = 2;
constexpr bool kI16Pays = false;
#include "cpu/kernels_table.h"
// clang-format on

}  // namespace

extern const Kernels kernels_generic;
const Kernels kernels_generic = make_kernels("generic");

}  // namespace vptq::cpu
