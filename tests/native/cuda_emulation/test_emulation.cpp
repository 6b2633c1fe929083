// The emulation itself: what kernels take for granted of a device.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "testing.h"

using namespace vptq::cuda;

namespace {

// Sums of blocks of threads, by halves, in shared memory; thread 0 leaves before the last barrier.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_blocks(const float* x, float* sums) {
  __shared__ float part[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  part[t] = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    sync_block();
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) {
    sums[blockIdx.x] = part[0];
    return;
  }
  sync_block();
}

void test_barriers() {
  constexpr int kThreads = 256, kBlocks = 5;
  std::vector<float> x(kThreads * kBlocks);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  const Device<float> from(x), to(std::vector<float>(kBlocks, 0.0f));
  for (int run = 0; run < 4; ++run) {
    launch(sum_blocks<kThreads>, {kBlocks, kThreads}, nullptr, from.get(), to.get());
    for (int b = 0; b < kBlocks; ++b) {
      EXPECT(to.values()[static_cast<size_t>(b)] == (b * kThreads + (kThreads - 1) / 2.0f) * kThreads);
    }
  }
}

__global__ void index_all(uint4* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * 24 + thread] = make_uint4(threadIdx.x, threadIdx.y, threadIdx.z, block);
}

void test_indices() {
  const Device<uint4> out(std::vector<uint4>(24 * 30));
  for (int run = 0; run < 2; ++run) {
    launch(index_all, {dim3(2, 3, 5), dim3(4, 3, 2)}, nullptr, out.get());
    const std::vector<uint4> values = out.values();
    for (unsigned i = 0; i < values.size(); ++i) {
      EXPECT(values[i].x == i % 4 && values[i].y == i / 4 % 3 && values[i].z == i / 12 % 2 && values[i].w == i / 24);
    }
  }
}

__global__ void shuffle_all(const double* x, double* rotated, float* sums) {
  const int t = static_cast<int>(threadIdx.x), lane = t % kWarp;
  rotated[t] = shuffle(x[t], lane + 1);
  auto sum = static_cast<float>(x[t]);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  sums[t] = sum;
}

void test_shuffles() {
  std::vector<double> x(96);
  for (size_t i = 0; i < x.size(); ++i) x[i] = 1.0 / (1u << i % 24);
  const Device<double> from(x), rotated(x);
  const Device<float> sums(std::vector<float>(96, 0.0f));
  for (int run = 0; run < 2; ++run) {
    launch(shuffle_all, {1, 96}, nullptr, from.get(), rotated.get(), sums.get());
    for (size_t i = 0; i < 96; ++i) {
      EXPECT(rotated.values()[i] == x[i / 32 * 32 + (i + 1) % 32]);
      float sum = 0;
      for (size_t l = 0; l < 32; ++l) sum += static_cast<float>(x[i / 32 * 32 + l]);
      EXPECT(std::fabs(sums.values()[i] - sum) <= 1e-6f * sum);
    }
  }
}

// c (16, 8) = a (16, 16) b; b as (8, 16) rows of columns, or transposed as (16, 8).
__global__ void multiply(const uint16_t* a, const uint16_t* b, bool transposed, float* c) {
  __shared__ __align__(16) uint16_t tile_a[16 * 16];
  __shared__ __align__(16) uint16_t tile_b[2 * 8 * 16];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += kWarp) {
    tile_a[i] = a[i];
    tile_b[i] = i < 128 ? b[i] : uint16_t{0};
  }
  sync_warp();
  uint32_t fa[4], fb[4];
  load_matrices(fa, &tile_a[lane % 16 * 16 + lane / 16 * 8]);
  if (transposed) {
    load_matrices_transposed(fb, &tile_b[lane * 8]);
  } else {
    load_matrices(fb, &tile_b[lane % 8 * 16 + lane / 8 % 2 * 8]);
  }
  float d[4] = {1, 1, 1, 1};
  const uint32_t column[2] = {fb[0], fb[1]};
  mma_f16(d, fa, column);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i] - 1;
}

void test_matrices() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const bool transposed : {false, true}) {
    std::vector<uint16_t> a(256), b(128);
    for (uint16_t& v : a) v = float_to_half(normal(random));
    for (uint16_t& v : b) v = float_to_half(normal(random));
    const Device<uint16_t> da(a), db(b);
    const Device<float> dc(std::vector<float>(128, 0.0f));
    launch(multiply, {1, 32}, nullptr, da.get(), db.get(), transposed, dc.get());
    const std::vector<float> c = dc.values();
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < 8; ++j) {
        double sum = 0;
        for (size_t k = 0; k < 16; ++k) {
          sum += double{half_to_float(a[i * 16 + k])} * half_to_float(transposed ? b[k * 8 + j] : b[j * 16 + k]);
        }
        EXPECT(std::fabs(c[i * 8 + j] - sum) < 1e-5);
      }
    }
  }
}

// A ring of two stages of a copy; `waits` or forgets to.
__global__ void copy_ring(const float4* x, int n, bool waits, float4* out) {
  auto* ring = reinterpret_cast<float4*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  copy_async(&ring[t], &x[t]);
  commit_copies();
  for (int i = 0; i < n; ++i) {
    if (i + 1 < n) copy_async(&ring[(i + 1) % 2 * width + t], &x[(i + 1) * width + t]);
    commit_copies();
    if (waits) wait_copies<1>();
    sync_block();
    out[i * width + t] = ring[i % 2 * width + width - 1 - t];
    sync_block();
  }
}

void test_copies() {
  constexpr int kWidth = 64, kSteps = 7;
  std::vector<float4> x(kWidth * kSteps);
  for (size_t i = 0; i < x.size(); ++i) x[i] = make_float4(static_cast<float>(i), 0, 0, 1);
  const Device<float4> from(x), to(x);
  for (const bool waits : {true, false}) {
    launch(copy_ring, {1, kWidth, 2 * kWidth * sizeof(float4)}, nullptr, from.get(), kSteps, waits, to.get());
    const std::vector<float4> out = to.values();
    for (size_t i = 0; i < out.size(); ++i) {
      const size_t step = i / kWidth, t = i % kWidth;
      EXPECT(waits ? out[i].x == x[step * kWidth + kWidth - 1 - t].x : std::isnan(out[i].x));
    }
  }
}

__global__ void read_unwritten(float* out) {
  out[threadIdx.x] = reinterpret_cast<const float*>(dynamic_shared())[threadIdx.x];
}

void test_unwritten_memory() {
  const Device<float> out({0});
  launch(read_unwritten, {1, 1, 4}, nullptr, out.get());
  EXPECT(std::isnan(out.values()[0]));
}

void test_halves() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const auto half = static_cast<uint16_t>(h);
    const uint32_t exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    double value =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25);
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    if (h >> 15) value = -value;
    const float f = half_to_float(half);
    if (std::isnan(value)) {
      EXPECT(std::isnan(f) && float_to_half(f) == 0x7fff);
      continue;
    }
    EXPECT(f == value && std::signbit(f) == std::signbit(value) && float_to_half(f) == half);
    // Between a number and the next one away from zero: the nearer, or the even one.
    if (exponent == 31) continue;
    const auto next = static_cast<uint16_t>(h + 1);
    const float step = exponent == 0 ? 0x1p-24f : std::ldexp(1.0f, static_cast<int>(exponent) - 25);
    const float middle = f + std::copysign(step / 2, f);
    EXPECT(float_to_half(middle) == (h % 2 ? next : half));
    EXPECT(float_to_half(std::nextafter(middle, 0.0f)) == half);
    EXPECT(float_to_half(std::nextafter(middle, 2 * middle)) == next);
  }
  EXPECT(float_to_half(INFINITY) == 0x7c00 && float_to_half(-1e10f) == 0xfc00 && float_to_half(-1e-30f) == 0x8000);
  EXPECT(add_halves(0x3c000001, 0x3c010001) == 0x40000002);  // 1 + 1.001 is a tie; subnormals are exact
}

__global__ void leave_a_lane_out(int which) {
  if (static_cast<int>(threadIdx.x) == which) return;
  sync_warp();
}
__global__ void part_ways(float* out) {
  if (threadIdx.x % 2) {
    sync_warp();
  } else {
    *out = shuffle(1.0f, 0);
  }
}
__global__ void bar_the_way() {
  if (threadIdx.x == 40) {
    sync_block();
  } else {
    sync_warp();
  }
}
__global__ void copy_askew(const float* x) { copy_async(dynamic_shared(), x + 1); }

void test_deaths() {
  const Device<float> x(std::vector<float>(8, 0.0f));
  std::string said = death([] { launch(leave_a_lane_out, {3, 64}, nullptr, 37); });
  EXPECT(contains(said, "no thread of the block can go on") && contains(said, "threads 32 to 36: wait in sync_warp"));
  EXPECT(contains(said, "threads 37 to 37: returned") && contains(said, "threads 0 to 31: returned"));
  said = death([] { launch(leave_a_lane_out, {1, 33}, nullptr, 99); });
  EXPECT(contains(said, "in a warp of fewer lanes") && contains(said, "thread (32, 0, 0)"));
  said = death([&] { launch(part_ways, {1, 32}, nullptr, x.get()); });
  EXPECT(contains(said, "while others of its warp wait in"));
  said = death([] { launch(bar_the_way, {1, 64}, nullptr); });
  EXPECT(contains(said, "threads 40 to 40: wait in sync_block"));
  said = death([&] { launch(copy_askew, {1, 32, 512}, nullptr, x.get()); });
  EXPECT(contains(said, "not aligned to 16 bytes"));
}

#ifdef __SANITIZE_ADDRESS__
__global__ void read_past(const float* x, float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = 1;
  sync_block();  // on a stack of the emulation's
  out[threadIdx.x] = x[threadIdx.x] + shared[threadIdx.x];
}

void test_sanitizer() {
  const Device<float> seven(std::vector<float>(7, 0.0f)), eight(std::vector<float>(8, 0.0f));
  EXPECT(contains(death([&] { launch(read_past, {1, 8, 32}, nullptr, seven.get(), eight.get()); }), "read_past"));
  EXPECT(contains(death([&] { launch(read_past, {1, 8, 28}, nullptr, eight.get(), eight.get()); }), "read_past"));
  EXPECT(contains(death([&] { std::printf("%f", static_cast<double>(eight.get()[0])); }), "use-after-poison"));
}
#else
void test_sanitizer() {}
#endif

#ifdef __SANITIZE_THREAD__
enum Race { kNone, kReadTooEarly, kWrittenTooEarly, kCopyNotShown, kShuffleIsNoBarrier };

// Threads of one warp that hand values on through shared memory, twice.
template <Race kRace>
__global__ void hand_on(const float4* x, float4* out) {
  auto* shared = reinterpret_cast<float4*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x), next = (t + 1) % kWarp;
  shared[t] = x[t];
  if (kRace != kReadTooEarly) sync_block();
  float4 sum = shared[next];
  if (kRace != kWrittenTooEarly) sync_warp();
  copy_async(&shared[t], &x[next]);
  commit_copies();
  wait_copies<0>();
  if (kRace != kCopyNotShown) sync_block();
  sum.x += shared[next].x;
  if (kRace == kShuffleIsNoBarrier) {
    sum.y = shuffle(sum.x, 0);
  } else {
    sync_warp();
  }
  shared[t].x = 0;
  out[t] = sum;
}

template <Race kRace>
void test_race(const float4* x, float4* out) {
  const auto run = [&] { launch(hand_on<kRace>, {2, kWarp, kWarp * sizeof(float4)}, nullptr, x, out); };
  if (kRace == kNone) {
    run();
  } else {
    const std::string said = death(run);
    EXPECT(contains(said, "data race") && contains(said, "#0 hand_on"));
  }
}

void test_races() {
  const Device<float4> x(std::vector<float4>(32)), out(std::vector<float4>(32));
  test_race<kNone>(x.get(), out.get());
  test_race<kReadTooEarly>(x.get(), out.get());
  test_race<kWrittenTooEarly>(x.get(), out.get());
  test_race<kCopyNotShown>(x.get(), out.get());
  test_race<kShuffleIsNoBarrier>(x.get(), out.get());
}
#else
void test_races() {}
#endif

}  // namespace

#ifdef __SANITIZE_THREAD__
extern "C" const char* __tsan_default_options();
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }
#endif

int main() {
  test_barriers();
  test_indices();
  test_shuffles();
  test_matrices();
  test_copies();
  test_unwritten_memory();
  test_halves();
  test_runtime_api();
  test_deaths();
  test_sanitizer();
  test_races();
  std::puts("ok");
}
