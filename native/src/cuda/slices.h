// Vector-quantised layers for the kernel vq_sliced (kernels.h). Here is the host's side, plain C++.
//
// A codebook of 65536 x 8 halves is 1 MiB: gathered from L2 each lookup moves a sector of 32 bytes, which takes some
// 5 ms a token in a model of 8 billion weights. Shared memory gathers five times as fast but holds a slice of the
// codebook only. So the indices are put in another order once, at load: by the slice that they point into. A block of
// threads then loads a slice and works through all that needs it.
//
// A slice goes with a window of columns, whose x is in shared memory as well. Its entries are lists, one for each block
// of v rows, in any order inside a list. An entry's 32 bits are, from the lowest on, `last` (2 bits alike, 2 more of
// 0), the index in the slice (12 bits) and, from bit 18 on, the column in the window: so the index is an offset in
// bytes to centroids that are 16 bytes apart, and the upper half one to x.
//
// A round is 32 entries, one a lane of a warp; a list fills whole rounds, the last of them marked `last`. Where entries
// are wanting, there are others whose column is the window's end, where x is 0. A chunk is 4 rounds, lane by lane, so
// that a lane loads its four entries at once. A run is the lists of a few consecutive blocks, one after another, and
// fills whole chunks: what a warp does at a time.
//
// Shared memory serves 16-byte loads 8 lanes at a time, fastest if each of them reads other banks. So lane l gets
// entries whose index is l modulo 8 while there are such, and in each round columns that differ modulo 32 where a short
// search finds them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vptq/model.h"

namespace vptq::cuda {

inline constexpr int kMaxSlicedVector = 16;
inline constexpr int kSlicedTokens = 4;  // that share a lookup
inline constexpr int kRoundEntries = 32;
inline constexpr int kChunkRounds = 4;
inline constexpr int kChunkEntries = kRoundEntries * kChunkRounds;
inline constexpr int kIndexShift = 4, kColumnShift = 18;
inline constexpr uint32_t kLastRound = 3;  // two bits: nvcc takes more instructions to test a single one
inline constexpr uint32_t kIndexMask = 0xfff0;

struct Slice {
  int columns;                      // which of the layer's VqColumns
  int residual;                     // 1: of their residual codebook
  int first_centroid, n_centroids;  // counted through the codebooks of all groups
  int first_column, n_columns;      // the window, in permuted order
  int first_run;                    // its runs: first_run ... in LayerSlices::run_begin()
  int blocks_per_run;
};

class LayerSlices {
 public:
  // Layers with other vectors, codebooks in float32, or 2^31 centroids and more, are not for vq_sliced.
  static bool possible(const std::vector<VqColumns>& columns);
  // columns: with indices in host memory. shared_bytes: what a block of threads can have of shared memory.
  LayerSlices(std::vector<VqColumns> columns, int out_features, size_t shared_bytes);

  // Bytes of entries() at most.
  size_t max_bytes() const { return max_chunks_ * kChunkEntries * sizeof(uint32_t); }

  // Making the entries, in three steps. The first and the last are for as many threads as there are, each with its own
  // ranges of [0, n_tasks()).
  int n_tasks() const { return n_tasks_; }
  void count(int begin, int end);
  void lay_out();
  void fill(int begin, int end, uint32_t* entries) const;  // (n_chunks(), kChunkEntries)

  int out_features() const { return out_features_; }
  size_t n_chunks() const { return run_begin_.back(); }
  const std::vector<Slice>& slices() const { return slices_; }
  const std::vector<uint32_t>& run_begin() const { return run_begin_; }  // in chunks; one more than there are runs
  int n_runs(const Slice& slice) const;

 private:
  // A codebook of each group. Its slices are slices_[first_slice ...] in the order (group, slice, window).
  struct Part {
    int columns, residual;
    int n_slices, n_windows, window;  // of a group; a window's columns
    int first_slice, first_task, n_runs, blocks_per_run;
  };

  void add_part(int columns, bool residual, size_t shared_bytes);
  const Part& part_of(int task) const;
  // The indices of one block in group q, (group_size).
  void unpack(const Part& part, int q, int block, uint16_t* indices) const;
  // visit(first, indices, n): a block's indices in a window of n columns. `first` is the first of its slices, counted
  // from the part's first one; the others follow n_windows apart.
  template <class Visit>
  void for_windows(const Part& part, int block, std::vector<uint16_t>& indices, Visit visit) const;

  std::vector<VqColumns> columns_;
  int out_features_, slice_bits_;
  std::vector<Part> parts_;
  std::vector<Slice> slices_;
  std::vector<uint32_t> run_begin_;
  int n_tasks_ = 0;
  size_t max_chunks_ = 0;
};

// Runs [run, end_run) of a slice of one of the layers of a launch.
struct SliceJob {
  Slice slice;
  int layer, number;  // of the launch; of the slice in the layer
  int run, end_run;
  int next;  // the job that the same block of threads does afterwards, or -1
};

// What each block of threads does: first the job of its own number.
struct SliceJobs {
  std::vector<SliceJob> jobs;
  int n_blocks = 0;
  int n_centroids = 0, n_columns = 0;  // of the largest slice and window
};

// Shares the layers of a launch out to at most n_blocks blocks of threads, so that the last one is done early.
SliceJobs share_out(const std::vector<const LayerSlices*>& layers, int n_blocks);

}  // namespace vptq::cuda
