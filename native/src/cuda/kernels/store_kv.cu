#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/kv_cache.cuh"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr uint16_t kHalfNaN = 0x7e00;

VPTQ_DEVICE bool is_finite(float x) { return x - x == 0; }

// Writers of a token's row to a head's keys or values, a warp together. Each has
//   kLimit             what the magnitudes of a value have to be below
//   put(d, x)          writes element d, which is lane d % kWarp's
//   spoil()            makes NaN of the row's first elements
template <DType type>
struct Row;

template <>
struct Row<DType::f32> {
  static constexpr float kLimit = __builtin_huge_valf();
  float* row;

  VPTQ_DEVICE Row(std::byte* head, int head_dim, int token) : row(reinterpret_cast<float*>(head) + token * head_dim) {}
  VPTQ_DEVICE void put(int d, float x) const { row[d] = x + (x - x); }
  VPTQ_DEVICE void spoil() const { row[0] = __builtin_nanf(""); }
};

template <>
struct Row<DType::f16> {
  static constexpr float kLimit = 65520;  // from here on it is rounded to infinity
  uint16_t* row;

  VPTQ_DEVICE Row(std::byte* head, int head_dim, int token)
      : row(reinterpret_cast<uint16_t*>(head) + token * head_dim) {}
  VPTQ_DEVICE void put(int d, float x) const {
    const uint16_t half = float_to_half(x);
    row[d] = (half & 0x7fff) == 0x7c00 ? kHalfNaN : half;
  }
  VPTQ_DEVICE void spoil() const { row[0] = kHalfNaN; }
};

template <>
struct Row<DType::q8_0> {
  static constexpr float kLimit = 65520.0f * 127;
  uint16_t* scales;
  std::byte* row;

  VPTQ_DEVICE Row(std::byte* head, int head_dim, int token)
      : scales(reinterpret_cast<uint16_t*>(head) + token * (head_dim / kQ8Block)),
        row(head + 2 * kBlockTokens * (head_dim / kQ8Block) + token * head_dim) {}
  VPTQ_DEVICE void put(int d, float x) const {
    float largest = fabsf(x), rest = x - x;  // rest: NaN if one of them is NaN or infinite
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      largest = fmaxf(largest, shuffle_xor(largest, mask));
      rest += shuffle_xor(rest, mask);
    }
    uint16_t scale = float_to_half(largest / 127 + rest);
    float unit = half_to_float(scale), units = 0;
    if (!is_finite(unit))
      scale = kHalfNaN;
    else if (unit > 0)  // beyond 127 where the scale was rounded down
      units = fmaxf(-127.0f, fminf(127.0f, rintf(x * (1 / unit))));
    row[d] = static_cast<std::byte>(static_cast<int8_t>(units));
    if (d % kQ8Block == 0) scales[d / kQ8Block] = scale;
  }
  VPTQ_DEVICE void spoil() const { scales[0] = kHalfNaN; }
};

static_assert(kQ8Block == kWarp);

// A warp a token and kv head.
template <DType type>
__global__ void __launch_bounds__(kThreads)
    store_kv_kernel(DeviceBatch batch, KvHeads heads, const float* k, const float* v) {
  const int lane = threadIdx.x % kWarp, n_head_kv = heads.n_head_kv, head_dim = heads.head_dim;
  const int t = blockIdx.y, head = int(blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (head >= n_head_kv) return;
  const int position = batch.positions[t];
  std::byte* block = block_of(batch, batch.sequences[t], position) + head * heads.head_bytes;
  const Row<type> key(block + heads.keys, head_dim, position % kBlockTokens);
  const Row<type> value(block + heads.values, head_dim, position % kBlockTokens);
  k += (int64_t{t} * n_head_kv + head) * head_dim;
  v += (int64_t{t} * n_head_kv + head) * head_dim;

  int fits = 1;
  for (int d = lane; d < head_dim; d += kWarp) fits &= fabsf(v[d]) < Row<type>::kLimit;
  for (int mask = kWarp / 2; mask > 0; mask /= 2) fits &= shuffle_xor(fits, mask);
  for (int d = lane; d < head_dim; d += kWarp) {
    key.put(d, k[d]);
    value.put(d, fits ? v[d] : 0.0f);
  }
  sync_warp();
  if (!fits && lane == 0) key.spoil();
}

}  // namespace

void store_kv(const DeviceBatch& batch, const KvLayout& layout, int layer, const float* k, const float* v,
              Stream stream) {
  if (batch.n == 0) return;
  const Shape shape{dim3((layout.n_head_kv * kWarp + kThreads - 1) / kThreads, batch.n), dim3(kThreads)};
  const auto kernel = layout.type == DType::q8_0  ? store_kv_kernel<DType::q8_0>
                      : layout.type == DType::f16 ? store_kv_kernel<DType::f16>
                                                  : store_kv_kernel<DType::f32>;
  launch(kernel, shape, stream, batch, KvHeads(layout, layer), k, v);
}

}  // namespace vptq::cuda
