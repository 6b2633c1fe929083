// Keys and values as they lie in a block of the cache (KvLayout in backend.h): of each head, keys and values alike, a
// row of head_dim elements for each of the kBlockTokens tokens. Q8_0: first the scales (kBlockTokens, head_dim /
// kQ8Block), then the int8s, so that these can be loaded 16 bytes at a time.
//
// What does not fit its type is stored as NaN, infinity too: a score of minus infinity would go unnoticed. A value that
// does not fit becomes a NaN in its key: among the values it would reach those who do not see it, times a weight of 0.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/kernels/quantised.cuh"

namespace vptq::cuda {

inline constexpr int kBlockTokens = KvLayout::kBlockTokens;

// One layer's keys and values: where they are in a block, in bytes.
struct KvHeads {
  size_t keys, values;  // of the first head
  size_t head_bytes;
  int n_head_kv, head_dim;

  KvHeads(const KvLayout& layout, int layer)
      : keys(layer * layout.layer_bytes()),
        values(keys + layout.layer_bytes() / 2),
        head_bytes(layout.head_bytes()),
        n_head_kv(layout.n_head_kv),
        head_dim(layout.head_dim) {}
};

// The block of a sequence's position.
VPTQ_DEVICE std::byte* block_of(const DeviceBatch& batch, int sequence, int position) {
  return to_global(batch.blocks[batch.first_block[sequence] + position / kBlockTokens]);
}

// A format has
//   kChunk                            elements that are loaded at once, in 16 bytes
//   Chunk                             these, as they lie there
//   load(head, head_dim, token, d)    elements [d, d + kChunk) of a token's row in a head's keys or values, 0 from
//                                     head_dim on
//   to_floats(chunk, x)
template <DType type>
struct KvFormat;

template <>
struct KvFormat<DType::f32> {
  static constexpr int kChunk = 4;
  using Chunk = float4;

  static VPTQ_DEVICE Chunk load(const std::byte* head, int head_dim, int token, int d) {
    const float* row = reinterpret_cast<const float*>(head) + token * head_dim;
    if (d >= head_dim) return make_float4(0, 0, 0, 0);
    if (head_dim % kChunk == 0) return *reinterpret_cast<const float4*>(row + d);
    const auto at = [&](int i) { return i < head_dim ? row[i] : 0.0f; };
    return make_float4(row[d], at(d + 1), at(d + 2), at(d + 3));
  }
  static VPTQ_DEVICE void to_floats(const Chunk& c, float (&x)[kChunk]) {
    x[0] = c.x;
    x[1] = c.y;
    x[2] = c.z;
    x[3] = c.w;
  }
};

template <>
struct KvFormat<DType::f16> {
  static constexpr int kChunk = 8;
  using Chunk = uint4;

  static VPTQ_DEVICE Chunk load(const std::byte* head, int head_dim, int token, int d) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(head) + token * head_dim;
    if (d >= head_dim) return make_uint4(0, 0, 0, 0);
    if (head_dim % kChunk == 0) return *reinterpret_cast<const uint4*>(row + d);
    const auto at = [&](int i) { return i < head_dim ? uint32_t{row[i]} : 0u; };
    const auto two = [&](int i) { return at(i) | at(i + 1) << 16; };
    return make_uint4(two(d), two(d + 2), two(d + 4), two(d + 6));
  }
  static VPTQ_DEVICE void to_floats(const Chunk& c, float (&x)[kChunk]) {
    const uint32_t pairs[] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = halves_to_floats(pairs[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct KvFormat<DType::q8_0> {
  static constexpr int kChunk = 16;
  struct Chunk {
    uint4 units;
    uint16_t scale;
  };

  static VPTQ_DEVICE Chunk load(const std::byte* head, int head_dim, int token, int d) {
    if (d >= head_dim) return {make_uint4(0, 0, 0, 0), 0};
    const int n_scales = head_dim / kQ8Block;
    const auto* scales = reinterpret_cast<const uint16_t*>(head);
    const std::byte* row = head + 2 * kBlockTokens * n_scales + token * head_dim;
    return {*reinterpret_cast<const uint4*>(row + d), scales[token * n_scales + d / kQ8Block]};
  }
  static VPTQ_DEVICE void to_floats(const Chunk& c, float (&x)[kChunk]) {
    const uint32_t words[] = {c.units.x, c.units.y, c.units.z, c.units.w};
    const float scale = half_to_float(c.scale);
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) q8_to_floats(words[i / 4], scale, x + i);
  }
};

}  // namespace vptq::cuda
