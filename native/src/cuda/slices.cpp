#include "cuda/slices.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "model/indices.h"

namespace vptq::cuda {
namespace {

constexpr int kCentroidRow = 16;   // bytes: centroids lie in rows that a lane loads at once
constexpr int kMaxSliceBits = 12;  // of an index in a slice
constexpr int kMaxWindow = 4096;   // columns
constexpr int kListEntries = 512;  // so many in a list are enough: shorter ones are work for more processors
constexpr int kRunEntries = 1024;  // about so many in a run
constexpr int kClasses = 8;        // of indices, by the banks of their centroids
constexpr int kBanks = 32;         // of x
constexpr int kSearched = 8;       // entries of a class, for one whose x is in a free bank

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int centroid_bytes(int v) { return ceil_div(v, 8) * kCentroidRow; }

// Two thirds of the shared memory, for the longest vectors: a launch may have those as well.
int slice_bits(size_t shared_bytes) {
  int bits = kMaxSliceBits;
  while (size_t(centroid_bytes(kMaxSlicedVector)) * 3 << bits > shared_bytes * 2) --bits;
  return bits;
}

// The rest is for x; one column more is 0.
int max_window(size_t shared_bytes, int n_slices) {
  const size_t rest = shared_bytes - (size_t(centroid_bytes(kMaxSlicedVector)) << slice_bits(shared_bytes));
  return std::min({kMaxWindow, static_cast<int>(rest / (kSlicedTokens * sizeof(float))) - 1, kListEntries * n_slices});
}

int rounds_of(int n_entries) { return std::max(1, ceil_div(n_entries, kRoundEntries)); }

uint32_t entry_of(int column, uint32_t index) { return uint32_t(column) << kColumnShift | index << kIndexShift; }

// Where a lane's entry lies in a run.
size_t place(int round, int lane) {
  return size_t(round / kChunkRounds) * kChunkEntries + lane * kChunkRounds + round % kChunkRounds;
}

// An entry that adds nothing.
uint32_t padding(const Slice& slice, int lane) {
  const int index = lane % kClasses;
  return entry_of(slice.n_columns, index < slice.n_centroids ? index : 0);
}

void pad(const Slice& slice, int first_round, int end_round, uint32_t* run) {
  for (int round = first_round; round < end_round; ++round)
    for (int lane = 0; lane < kRoundEntries; ++lane) run[place(round, lane)] = padding(slice, lane);
}

// The entries of one block in one window, sorted by slice and, in a slice, by class. Made once a thread.
class SortedEntries {
 public:
  explicit SortedEntries(int n_slices, int slice_bits)
      : slice_bits_(slice_bits), begin_(size_t(n_slices) * kClasses + 1), next_(begin_.size()) {}

  void sort(const uint16_t* indices, int n) {
    entries_.resize(n);
    std::fill(begin_.begin(), begin_.end(), 0);
    for (int j = 0; j < n; ++j) ++begin_[key(indices[j]) + 1];
    std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
    next_ = begin_;
    for (int j = 0; j < n; ++j) entries_[next_[key(indices[j])]++] = entry_of(j, indices[j] & low_bits(slice_bits_));
  }

  // Puts the list of slice s of the window into a run, from round `first` on. Returns its number of rounds.
  int put(int s, const Slice& slice, int first, uint32_t* run) {
    const int n_entries = begin_[(s + 1) * kClasses] - begin_[s * kClasses], n_rounds = rounds_of(n_entries);
    for (int c = 0; c < kClasses; ++c) next_[c] = begin_[s * kClasses + c];
    const int* end = &begin_[s * kClasses + 1];
    for (int round = 0; round < n_rounds; ++round) {
      uint32_t banks = 0;  // whose x the round has
      for (int lane = 0; lane < kRoundEntries; ++lane) {
        const int c = lane % kClasses;
        uint32_t& entry = run[place(first + round, lane)];
        entry = next_[c] < end[c] ? take(next_[c], end[c], banks) : kEmpty;
      }
    }
    // What is left of the larger classes fills what the smaller ones leave empty.
    int c = 0;
    for (int round = 0; round < n_rounds; ++round)
      for (int lane = 0; lane < kRoundEntries; ++lane) {
        uint32_t& entry = run[place(first + round, lane)];
        if (entry == kEmpty) {
          while (c < kClasses && next_[c] == end[c]) ++c;
          entry = c < kClasses ? entries_[next_[c]++] : padding(slice, lane);
        }
        if (round == n_rounds - 1) entry |= kLastRound;
      }
    return n_rounds;
  }

 private:
  static constexpr uint32_t kEmpty = ~0u;

  size_t key(uint16_t index) const { return size_t(index >> slice_bits_) * kClasses + index % kClasses; }

  // The next entry, or one soon after it whose x is in a bank that is free.
  uint32_t take(int& next, int end, uint32_t& banks) {
    const int searched_end = std::min(end, next + kSearched);
    int found = next;
    for (int i = next; i < searched_end; ++i)
      if (!(banks >> (entries_[i] >> kColumnShift) % kBanks & 1)) {
        found = i;
        break;
      }
    std::swap(entries_[next], entries_[found]);
    banks |= 1u << (entries_[next] >> kColumnShift) % kBanks;
    return entries_[next++];
  }

  int slice_bits_;
  std::vector<uint32_t> entries_;
  std::vector<int> begin_;  // of (slice, class)
  std::vector<int> next_;
};

}  // namespace

bool LayerSlices::possible(const std::vector<VqColumns>& columns) {
  return std::all_of(columns.begin(), columns.end(), [](const VqColumns& c) {
    const int64_t n_centroids = int64_t{c.n_groups} * std::max(c.k, c.r);  // a Slice counts them
    return c.v <= kMaxSlicedVector && c.type != DType::f32 && n_centroids <= std::numeric_limits<int>::max();
  });
}

LayerSlices::LayerSlices(std::vector<VqColumns> columns, int out_features, size_t shared_bytes)
    : columns_(std::move(columns)), out_features_(out_features), slice_bits_(cuda::slice_bits(shared_bytes)) {
  run_begin_.push_back(0);
  for (int i = 0; i < static_cast<int>(columns_.size()); ++i) {
    add_part(i, false, shared_bytes);
    if (columns_[i].r) add_part(i, true, shared_bytes);
  }
}

void LayerSlices::add_part(int columns, bool residual, size_t shared_bytes) {
  const VqColumns& c = columns_[columns];
  if (c.group_size == 0) return;
  Part p{};
  p.columns = columns;
  p.residual = residual;
  const int k = residual ? c.r : c.k, slice_centroids = 1 << slice_bits_;
  p.n_slices = ceil_div(k, slice_centroids);
  p.window = ceil_div(c.group_size, ceil_div(c.group_size, max_window(shared_bytes, p.n_slices)));
  p.n_windows = ceil_div(c.group_size, p.window);
  p.first_slice = static_cast<int>(slices_.size());
  p.first_task = n_tasks_;
  p.blocks_per_run = std::clamp(kRunEntries * p.n_slices / p.window, 1, c.n_blocks);
  p.n_runs = ceil_div(c.n_blocks, p.blocks_per_run);
  n_tasks_ += p.n_runs;
  for (int q = 0; q < c.n_groups; ++q)
    for (int s = 0; s < p.n_slices; ++s)
      for (int w = 0; w < p.n_windows; ++w) {
        const int first = s * slice_centroids, column = w * p.window;
        slices_.push_back({columns, residual, q * k + first, std::min(slice_centroids, k - first),
                           c.first_column + q * c.group_size + column, std::min(p.window, c.group_size - column),
                           static_cast<int>(run_begin_.size()) - 1, p.blocks_per_run});
        run_begin_.resize(run_begin_.size() + p.n_runs);
      }
  const size_t n_lists = size_t(c.n_groups) * p.n_slices * p.n_windows * c.n_blocks;
  const size_t n_rounds = size_t(c.n_groups) * c.group_size * c.n_blocks / kRoundEntries + n_lists;
  max_chunks_ += n_rounds / kChunkRounds + size_t(c.n_groups) * p.n_slices * p.n_windows * p.n_runs;
  parts_.push_back(p);
}

const LayerSlices::Part& LayerSlices::part_of(int task) const {
  return *std::find_if(parts_.rbegin(), parts_.rend(), [task](const Part& p) { return p.first_task <= task; });
}

int LayerSlices::n_runs(const Slice& slice) const {
  return ceil_div(columns_[slice.columns].n_blocks, slice.blocks_per_run);
}

void LayerSlices::unpack(const Part& part, int q, int block, uint16_t* indices) const {
  const VqColumns& c = columns_[part.columns];
  const std::byte* row = c.indices + (int64_t{q} * c.n_blocks + block) * c.row_bytes;
  const int bits = c.index_bits + c.res_bits;
  if (bits == 16 && !c.r) {
    std::memcpy(indices, row, size_t(c.group_size) * 2);
    return;
  }
  const int shift = part.residual ? c.index_bits : 0;
  const uint32_t mask = low_bits(part.residual ? c.res_bits : c.index_bits);
  uint64_t window = 0;
  int n_bits = 0;  // in the window
  for (int j = 0; j < c.group_size; ++j) {
    if (n_bits < bits) {
      uint32_t word;
      std::memcpy(&word, row, 4);
      row += 4;
      window |= uint64_t{word} << n_bits;
      n_bits += 32;
    }
    indices[j] = static_cast<uint16_t>(window >> shift & mask);
    window >>= bits;
    n_bits -= bits;
  }
}

template <class Visit>
void LayerSlices::for_windows(const Part& part, int block, std::vector<uint16_t>& indices, Visit visit) const {
  const VqColumns& c = columns_[part.columns];
  indices.resize(c.group_size);
  for (int q = 0; q < c.n_groups; ++q) {
    unpack(part, q, block, indices.data());
    for (int w = 0; w < part.n_windows; ++w)
      visit(q * part.n_slices * part.n_windows + w, &indices[size_t(w) * part.window],
            std::min(part.window, c.group_size - w * part.window));
  }
}

void LayerSlices::count(int begin, int end) {
  std::vector<uint16_t> indices;
  std::vector<int> n_entries, n_rounds;  // of a window's slices; of all slices
  for (int task = begin; task < end; ++task) {
    const Part& p = part_of(task);
    const VqColumns& c = columns_[p.columns];
    const int run = task - p.first_task, n_blocks = std::min(p.blocks_per_run, c.n_blocks - run * p.blocks_per_run);
    n_rounds.assign(size_t(c.n_groups) * p.n_slices * p.n_windows, 0);
    for (int b = 0; b < n_blocks; ++b)
      for_windows(p, run * p.blocks_per_run + b, indices, [&](int first, const uint16_t* window, int n) {
        n_entries.assign(p.n_slices, 0);
        for (int j = 0; j < n; ++j) ++n_entries[window[j] >> slice_bits_];
        for (int s = 0; s < p.n_slices; ++s) n_rounds[first + s * p.n_windows] += rounds_of(n_entries[s]);
      });
    for (size_t s = 0; s < n_rounds.size(); ++s)
      run_begin_[slices_[p.first_slice + s].first_run + run + 1] = ceil_div(n_rounds[s], kChunkRounds);
  }
}

void LayerSlices::lay_out() { std::partial_sum(run_begin_.begin(), run_begin_.end(), run_begin_.begin()); }

void LayerSlices::fill(int begin, int end, uint32_t* entries) const {
  std::vector<uint16_t> indices;
  std::vector<int> n_rounds;  // that a slice's run has
  for (int task = begin; task < end;) {
    const Part& p = part_of(task);
    const VqColumns& c = columns_[p.columns];
    SortedEntries sorted(p.n_slices, slice_bits_);
    for (; task < std::min(end, p.first_task + p.n_runs); ++task) {
      const int run = task - p.first_task, n_blocks = std::min(p.blocks_per_run, c.n_blocks - run * p.blocks_per_run);
      n_rounds.assign(size_t(c.n_groups) * p.n_slices * p.n_windows, 0);
      const auto run_of = [&](const Slice& slice) { return slice.first_run + run; };
      const auto put = [&](int first, const uint16_t* window, int n) {
        sorted.sort(window, n);
        for (int s = 0; s < p.n_slices; ++s) {
          const Slice& slice = slices_[p.first_slice + first + s * p.n_windows];
          int& rounds = n_rounds[first + s * p.n_windows];
          rounds += sorted.put(s, slice, rounds, entries + size_t(run_begin_[run_of(slice)]) * kChunkEntries);
        }
      };
      for (int b = 0; b < n_blocks; ++b) for_windows(p, run * p.blocks_per_run + b, indices, put);
      for (size_t s = 0; s < n_rounds.size(); ++s) {
        const Slice& slice = slices_[p.first_slice + s];
        const size_t first = run_begin_[run_of(slice)], end_chunk = run_begin_[run_of(slice) + 1];
        pad(slice, n_rounds[s], static_cast<int>(end_chunk - first) * kChunkRounds, entries + first * kChunkEntries);
      }
    }
  }
}

namespace {

// Estimates in nanoseconds, of a block of threads that has a multiprocessor to itself: what a chunk reads of shared
// memory takes it some 32 cycles; before it is a wait for x and for the slice, out of L2 40 bytes a nanosecond.
constexpr int64_t kChunkTime = 18;
constexpr int64_t kWaitTime = 2000;
constexpr int64_t kL2Rate = 40;

// The jobs of blocks of threads that take no longer than `time`, unless a single run does. Nothing, where that is more
// than max_blocks.
std::vector<std::vector<SliceJob>> share_out_by(const std::vector<const LayerSlices*>& layers, int64_t time,
                                                int max_blocks) {
  std::vector<std::vector<SliceJob>> blocks(1);
  int64_t rest = time;  // of the last block
  for (int l = 0; l < static_cast<int>(layers.size()); ++l)
    for (int s = 0; s < static_cast<int>(layers[l]->slices().size()); ++s) {
      const Slice& slice = layers[l]->slices()[s];
      const int64_t start = kWaitTime + int64_t{slice.n_centroids} * kCentroidRow / kL2Rate;
      const uint32_t* begin = &layers[l]->run_begin()[slice.first_run];
      const int n_runs = layers[l]->n_runs(slice);
      for (int run = 0; run < n_runs;) {
        const auto runs_that_fit = [&] {
          const int64_t end_chunk = begin[run] + (rest - start) / kChunkTime;
          return static_cast<int>(std::upper_bound(begin + run + 1, begin + n_runs + 1, end_chunk) - (begin + run + 1));
        };
        int n = runs_that_fit();
        if (n == 0 && !blocks.back().empty()) {
          if (static_cast<int>(blocks.size()) == max_blocks) return {};
          blocks.emplace_back();
          rest = time;
          n = runs_that_fit();
        }
        n = std::max(1, n);
        blocks.back().push_back({slice, l, s, run, run + n, -1});
        rest -= start + (begin[run + n] - begin[run]) * kChunkTime;
        run += n;
      }
    }
  return blocks;
}

}  // namespace

SliceJobs share_out(const std::vector<const LayerSlices*>& layers, int n_blocks) {
  int64_t low = 0, high = int64_t{1} << 40;  // the least time that needs no more than n_blocks lies between
  while (high - low > 1 + low / 128) {
    const int64_t middle = low + (high - low) / 2;
    (share_out_by(layers, middle, n_blocks).empty() ? low : high) = middle;
  }
  const std::vector<std::vector<SliceJob>> blocks = share_out_by(layers, high, n_blocks);
  SliceJobs out;
  out.n_blocks = static_cast<int>(blocks.size());
  for (const auto& jobs : blocks) out.jobs.push_back(jobs.front());
  for (int b = 0; b < out.n_blocks; ++b)
    for (size_t i = 1, before = b; i < blocks[b].size(); ++i) {
      out.jobs[before].next = static_cast<int>(out.jobs.size());
      before = out.jobs.size();
      out.jobs.push_back(blocks[b][i]);
    }
  for (const SliceJob& job : out.jobs) {
    out.n_centroids = std::max(out.n_centroids, job.slice.n_centroids);
    out.n_columns = std::max(out.n_columns, job.slice.n_columns);
  }
  return out;
}

}  // namespace vptq::cuda
