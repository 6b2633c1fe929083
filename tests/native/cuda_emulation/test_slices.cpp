// The order of indices that vq_sliced reads, and how its work is shared out: every index once, and every run.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "cuda/slices.h"
#include "model/indices.h"
#include "testing.h"

using namespace vptq;
using namespace vptq::cuda;

namespace {

constexpr size_t kSharedBytes[] = {227 << 10, 163 << 10, 99 << 10};

int bits_for(int count) {
  int bits = 0;
  while (1 << bits < count) ++bits;
  return bits;
}

std::vector<uint32_t> make_words(size_t n, std::mt19937& random) {
  std::vector<uint32_t> words(n);
  for (uint32_t& word : words) word = random();
  return words;
}

// Columns of random indices, with powers of two for k and r: any bits name a centroid.
struct RandomColumns {
  RandomColumns(int first_column, int n_groups, int group_size, int out_features, int v, int k, int r,
                std::mt19937& random) {
    columns.first_column = first_column;
    columns.n_groups = n_groups;
    columns.group_size = group_size;
    columns.v = v;
    columns.k = k;
    columns.r = r;
    columns.index_bits = bits_for(k);
    columns.res_bits = r ? bits_for(r) : 0;
    columns.n_blocks = (out_features + v - 1) / v;
    const int64_t n_words = (int64_t{group_size} * (columns.index_bits + columns.res_bits) + 31) / 32;
    columns.row_bytes = 4 * n_words;
    words = make_words(size_t(n_groups) * columns.n_blocks * n_words, random);
    columns.indices = reinterpret_cast<const std::byte*>(words.data());
  }
  RandomColumns(const RandomColumns&) = delete;

  int index(bool residual, int q, int block, int j) const {
    const VqColumns& c = columns;
    const uint32_t value = packed_value(c.indices + (int64_t{q} * c.n_blocks + block) * c.row_bytes, c.row_bytes, j,
                                        c.index_bits + c.res_bits);
    return static_cast<int>(residual ? value >> c.index_bits : value & low_bits(c.index_bits));
  }

  std::vector<uint32_t> words;
  VqColumns columns;
};

// The entries in ranges of tasks, the last one first.
std::vector<uint32_t> make_entries(LayerSlices& slices, int range) {
  const auto ranges = [&](auto f) {
    for (int begin = (slices.n_tasks() - 1) / range * range; begin >= 0; begin -= range)
      f(begin, std::min(begin + range, slices.n_tasks()));
  };
  ranges([&](int begin, int end) { slices.count(begin, end); });
  slices.lay_out();
  EXPECT(slices.n_chunks() * kChunkEntries * sizeof(uint32_t) <= slices.max_bytes());
  std::vector<uint32_t> entries(slices.n_chunks() * kChunkEntries, ~0u);
  ranges([&](int begin, int end) { slices.fill(begin, end, entries.data()); });
  return entries;
}

// One run's lists hold each column of their slice that points into it, and nothing else. Returns how many that are.
size_t check_run(const RandomColumns& random, const Slice& slice, int run, const uint32_t* begin, const uint32_t* end) {
  const VqColumns& c = random.columns;
  const int k = slice.residual ? c.r : c.k, q = slice.first_centroid / k;
  const int first_column = slice.first_column - c.first_column - q * c.group_size;
  const int end_block = std::min((run + 1) * slice.blocks_per_run, c.n_blocks);
  size_t n_found = 0;
  int block = run * slice.blocks_per_run;
  std::vector<bool> found(slice.n_columns);
  for (const uint32_t* chunk = begin; chunk < end; chunk += kChunkEntries)
    for (int round = 0; round < kChunkRounds; ++round) {
      for (int lane = 0; lane < kRoundEntries; ++lane) {
        const uint32_t entry = chunk[lane * kChunkRounds + round];
        const int column = static_cast<int>(entry >> kColumnShift);
        const int index = static_cast<int>((entry & kIndexMask) >> kIndexShift);
        EXPECT(column <= slice.n_columns && index < slice.n_centroids);
        EXPECT((entry & kLastRound) == (chunk[round] & kLastRound));
        if (column == slice.n_columns) continue;  // adds nothing
        EXPECT(block < end_block && !found[column]);
        EXPECT(q * k + random.index(slice.residual, q, block, first_column + column) == slice.first_centroid + index);
        found[column] = true;
        ++n_found;
      }
      if (!(chunk[round] & kLastRound)) continue;
      ++block;
      found.assign(slice.n_columns, false);
    }
  EXPECT(block == end_block);
  return n_found;
}

void check_entries(const std::vector<const RandomColumns*>& layer, int out_features, size_t shared_bytes) {
  std::vector<VqColumns> columns;
  size_t n_indices = 0, n_found = 0;
  for (const RandomColumns* random : layer) {
    const VqColumns& c = columns.emplace_back(random->columns);
    n_indices += size_t(c.n_groups) * c.group_size * c.n_blocks * (c.r ? 2 : 1);
  }
  EXPECT(LayerSlices::possible(columns));
  LayerSlices slices(columns, out_features, shared_bytes);
  const std::vector<uint32_t> entries = make_entries(slices, 3);
  LayerSlices again(columns, out_features, shared_bytes);
  EXPECT(make_entries(again, 1000) == entries);
  for (const Slice& slice : slices.slices()) {
    EXPECT(size_t(slice.n_centroids) * 2 * kMaxSlicedVector + (slice.n_columns + 1) * kSlicedTokens * sizeof(float) <=
           shared_bytes);
    for (int run = 0; run < slices.n_runs(slice); ++run) {
      const uint32_t* begin = &slices.run_begin()[slice.first_run + run];
      n_found += check_run(*layer[slice.columns], slice, run, entries.data() + size_t(begin[0]) * kChunkEntries,
                           entries.data() + size_t(begin[1]) * kChunkEntries);
    }
  }
  EXPECT(n_found == n_indices);
}

void test_entries(std::mt19937& random) {
  for (const size_t shared_bytes : kSharedBytes) {
    for (const auto& [v, k, r] : {std::array{8, 65536, 0},
                                  {8, 65536, 256},
                                  {6, 4096, 0},
                                  {12, 4096, 4096},
                                  {16, 65536, 1024},
                                  {16, 32768, 32768},
                                  {2, 16, 0},
                                  {4, 256, 4},
                                  {7, 2, 0}}) {
      const RandomColumns columns(0, 1, 700, 203, v, k, r, random);
      check_entries({&columns}, 203, shared_bytes);
    }
    const RandomColumns outliers(0, 1, 31, 55, 4, 65536, 0, random), groups(31, 5, 97, 55, 12, 4096, 64, random);
    check_entries({&outliers, &groups}, 55, shared_bytes);
    const RandomColumns wide(0, 1, 9001, 17, 8, 16384, 0, random), one(0, 1, 1, 1, 1, 2, 0, random);
    check_entries({&wide}, 17, shared_bytes);
    check_entries({&one}, 1, shared_bytes);
  }
}

void test_possible() {
  VqColumns c;
  c.v = kMaxSlicedVector;
  EXPECT(LayerSlices::possible({c}));
  c.type = DType::f32;
  EXPECT(!LayerSlices::possible({c}));
  c.type = DType::bf16;
  c.v = kMaxSlicedVector + 1;
  EXPECT(!LayerSlices::possible({VqColumns{}, c}));
  c.v = 1;
  c.k = 1 << 15;
  c.n_groups = (1 << 16) - 1;
  EXPECT(LayerSlices::possible({c}));
  c.n_groups = 1 << 16;
  EXPECT(!LayerSlices::possible({c}));
}

// Every run of every slice is in one job, and every job is one block's.
void test_share_out(std::mt19937& random) {
  const RandomColumns q(0, 1, 600, 512, 8, 65536, 0, random), k(0, 2, 300, 100, 6, 4096, 256, random);
  LayerSlices a({q.columns}, 512, kSharedBytes[0]), b({k.columns}, 100, kSharedBytes[0]);
  make_entries(a, 1);
  make_entries(b, 1);
  for (const int n_blocks : {1, 2, 7, 132, 10000}) {
    const std::vector<const LayerSlices*> layers = {&a, &b};
    const SliceJobs jobs = share_out(layers, n_blocks);
    EXPECT(jobs.n_blocks >= 1 && jobs.n_blocks <= n_blocks);
    std::map<std::pair<int, int>, std::vector<int>> done;  // times that each run of a slice of a layer is
    size_t n_jobs = 0;
    for (int block = 0; block < jobs.n_blocks; ++block)
      for (int j = block; j >= 0; j = jobs.jobs[j].next, ++n_jobs) {
        const SliceJob& job = jobs.jobs[j];
        const Slice& slice = layers[job.layer]->slices()[job.number];
        EXPECT(job.slice.first_run == slice.first_run && job.run < job.end_run);
        EXPECT(slice.n_centroids <= jobs.n_centroids && slice.n_columns <= jobs.n_columns);
        std::vector<int>& runs = done[{job.layer, job.number}];
        runs.resize(layers[job.layer]->n_runs(slice));
        for (int run = job.run; run < job.end_run; ++run) ++runs.at(run);
      }
    EXPECT(n_jobs == jobs.jobs.size());
    EXPECT(done.size() == a.slices().size() + b.slices().size());
    for (const auto& [slice, runs] : done) EXPECT(std::count(runs.begin(), runs.end(), 1) == std::ssize(runs));
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  test_possible();
  test_entries(random);
  test_share_out(random);
}
