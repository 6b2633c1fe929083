// All kernels over the Lanes<N> of one instruction set. Included inside an anonymous namespace after vec_*.h by each
// kernels_<isa>.cpp, which is compiled with that instruction set's flags: nothing here may end up as a function that
// the linker shares between them. So no standard library in these sources.

// clang-format off
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/unpack.h"
#include "cpu/kernels/codebook.h"
#include "cpu/kernels/vq_few.h"
#include "cpu/kernels/vq_many.h"
#include "cpu/kernels/i16.h"
#include "cpu/kernels/vq.h"
#include "cpu/kernels/dense.h"
#include "cpu/kernels/kv_cache.h"
#include "cpu/kernels/attention.h"
// clang-format on

constexpr Kernels make_kernels(const char* isa) {
  return {.isa = isa,
          .rows_at_a_time = rows_at_a_time,
          .vq = vq,
          .i16_pays = kI16Pays,
          .i16_step = i16_step,
          .i16_size = i16_size,
          .round_columns = round_columns,
          .vq_i16 = vq_i16,
          .dense = dense,
          .gather = gather,
          .dot = dot,
          .sum = sum_of,
          .rms_norm = rms_norm,
          .store_kv = store_kv,
          .attend = attend,
          .swiglu = swiglu,
          .add = add,
          .row = row};
}
