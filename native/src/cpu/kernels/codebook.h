// Looking weights up in codebooks. Included inside an anonymous namespace, after a vec_*.h.
//
// A block is v output rows. A column's v weights in a block are one centroid (plus one residual centroid): v lanes.

constexpr int kVector = Words::kCount;  // numbers side by side in the processor's vector
constexpr int kTileColumns = 128;       // whose indices are unpacked at a time; a multiple of Words::kCount

// One block's v lanes. p[0] is where its centroid lies.
template <int V>
struct Block {
  static constexpr int kCount = 1, kStride = V, kFirst = 0;
  using Sums = Lanes<V>;
  static Sums load(const float* const* p) { return Sums::load(p[0]); }
  static Sums load_f16(const uint16_t* const* p) { return Sums::load_f16(p[0]); }
  static Sums load_bf16(const uint16_t* const* p) { return Sums::load_bf16(p[0]); }
};

// As many blocks as fill the processor's vector, kStride lanes apart, each from lane kFirst on: one, unless a vec_*.h
// says otherwise. With kFirst > 0 a load begins that many weights before the centroid: there is always something, in a
// file its header at least, and what it is does not matter.
template <int V>
struct Blocks : Block<V> {};

// How centroids lie in memory. B: Block<V> or Blocks<V>
struct F16Centroids {
  using Element = uint16_t;
  template <class B>
  static typename B::Sums load(const Element* const* p) {
    return B::load_f16(p);
  }
};
struct Bf16Centroids {
  using Element = uint16_t;
  template <class B>
  static typename B::Sums load(const Element* const* p) {
    return B::load_bf16(p);
  }
};
struct F32Centroids {
  using Element = float;
  template <class B>
  static typename B::Sums load(const Element* const* p) {
    return B::load(p);
  }
};

inline const uint8_t* index_row(const VqColumns& c, int group, int block) {
  return reinterpret_cast<const uint8_t*>(c.indices) + (int64_t{group} * c.n_blocks + block) * c.row_bytes;
}

constexpr int kTilesAhead = 2;  // one is late: a tile of eight blocks takes less than memory does to answer

// Asks for the indices of the tile that comes kTilesAhead tiles after columns [j0, j0 + n) of a block: where the row
// ends before, the next group's, or the first group's of the block that lies `ahead` blocks on. They come from memory,
// from so many rows at a time that the processor does not foresee it; into L2, as L1 is for the codebook. Inlined by
// force: GCC takes a function that only prefetches for one without effect and drops the call.
[[gnu::always_inline]] inline void prefetch_indices(const VqColumns& c, int group, int block, int j0, int n,
                                                    int ahead) {
  const int bits = c.index_bits + c.res_bits;
  int j = j0 + n + (kTilesAhead - 1) * kTileColumns;
  const uint8_t* row = index_row(c, group, block);
  if (j >= c.group_size) {
    j -= c.group_size;
    row = group + 1 < c.n_groups ? index_row(c, group + 1, block) : index_row(c, 0, block + ahead);
  }
  const uint8_t* next = row + int64_t{j} * bits / 8;
  for (int i = 0; i < kTileColumns * bits / 8; i += 64) __builtin_prefetch(next + i, 0, 2);
}

// Where one block's centroids of a tile's columns lie, in elements from the codebook's first.
template <bool Residual>
struct Offsets {
  alignas(64) uint32_t centroid[kTileColumns];
  alignas(64) uint32_t res_centroid[Residual ? kTileColumns : 1];
};

// One group's codebooks.
template <int V, class Centroids, bool Residual>
class Codebook {
 public:
  using Element = typename Centroids::Element;

  Codebook(const VqColumns& c, int group)
      : centroids_(reinterpret_cast<const Element*>(c.centroids) + int64_t{group} * c.k * V),
        res_centroids_(Residual ? reinterpret_cast<const Element*>(c.res_centroids) + int64_t{group} * c.r * V
                                : nullptr),
        index_bits_(uint32_t(c.index_bits)) {}

  // The offsets of n columns from j0 on. Found for many at once: this is vector code, as a shift and a mask beside each
  // load would not be.
  void find(const Unpacker& unpack, const uint8_t* row, int64_t row_bytes, int j0, int n,
            Offsets<Residual>& offsets) const {
    const Words v = Words::broadcast(V), index_bits = Words::broadcast(index_bits_);
    const Words mask = Words::broadcast((1u << index_bits_) - 1);  // k is at most 2^16
    unpack(row, row_bytes, j0, n, [&](int j, Words value) {
      if constexpr (Residual) {
        ((value >> index_bits) * v).store(offsets.res_centroid + j);
        value = value & mask;
      }
      (value * v).store(offsets.centroid + j);
    });
  }

  // The same in the N blocks from `block` on, of which n_blocks are there: the last one again for those that are not.
  template <int N>
  [[gnu::always_inline]] void find(const Unpacker& unpack, const VqColumns& c, int group, int block, int n_blocks,
                                   int j0, int n, Offsets<Residual> (&offsets)[N]) const {
    for (int b = 0; b < N; ++b) {
      const int there = block + (b < n_blocks ? b : n_blocks - 1);
      find(unpack, index_row(c, group, there), c.row_bytes, j0, n, offsets[b]);
      prefetch_indices(c, group, there, j0, n, N);
    }
  }

  // Column j's weights in B::kCount blocks.
  template <class B>
  [[gnu::always_inline]] typename B::Sums look_up(const Offsets<Residual>* offsets, int j) const {
    const Element* p[B::kCount];
    for (int i = 0; i < B::kCount; ++i) p[i] = centroids_ + offsets[i].centroid[j];
    const auto w = Centroids::template load<B>(p);
    if constexpr (Residual) {
      for (int i = 0; i < B::kCount; ++i) p[i] = res_centroids_ + offsets[i].res_centroid[j];
      return w + Centroids::template load<B>(p);
    }
    return w;
  }

 private:
  const Element *centroids_, *res_centroids_;
  uint32_t index_bits_;
};

// Adds or stores a block's sums to y, up to row_end: rows past out_features are padding.
template <int V>
void put(const float* sums, int block, int row_end, bool accumulate, float* y) {
  const int row = block * V;
  for (int lane = 0; lane < V && row + lane < row_end; ++lane)
    y[row + lane] = accumulate ? y[row + lane] + sums[lane] : sums[lane];
}

// Calls use<Centroids>().
template <class Use>
auto with_centroids(const VqColumns& c, Use use) {
  switch (c.type) {
    case DType::f16: return use.template operator()<F16Centroids>();
    case DType::bf16: return use.template operator()<Bf16Centroids>();
    default: return use.template operator()<F32Centroids>();
  }
}

// The vector lengths that models use.
inline bool has_kernel(int v) { return v == 2 || v == 4 || v == 6 || v == 8 || v == 12 || v == 16; }

// Calls use<V, Centroids, Residual>(); c.v has a kernel.
template <class Use>
void with_codebook(const VqColumns& c, Use use) {
  with_centroids(c, [&]<class Centroids>() {
    const auto with_length = [&]<int V>() {
      c.r ? use.template operator()<V, Centroids, true>() : use.template operator()<V, Centroids, false>();
    };
    switch (c.v) {
      case 2: return with_length.template operator()<2>();
      case 4: return with_length.template operator()<4>();
      case 6: return with_length.template operator()<6>();
      case 8: return with_length.template operator()<8>();
      case 12: return with_length.template operator()<12>();
      default: return with_length.template operator()<16>();
    }
  });
}
