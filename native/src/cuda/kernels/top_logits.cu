// A row's largest logits in two steps, so that many multiprocessors read it: blocks of threads select from its parts,
// and one from what they have found.
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace vptq::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kPart = 4096;  // logits: 16 KiB, which stay in L1 from one look to the next
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

VPTQ_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Larger for what is to be taken first: larger logits, and of equal ones lower tokens, so that no two keys are equal.
// Logits that are not finite come before all others. Below all others is what stands for no token.
VPTQ_DEVICE uint64_t key_of(Candidate c) {
  if (c.token < 0) return 0;
  constexpr uint32_t kSign = 0x80000000u, kExponent = 0x7f800000u;
  const uint32_t bits = bits_of(c.logit);
  uint32_t order = bits & kSign ? ~bits : bits | kSign;
  if (bits == kSign) order = kSign;  // -0 is as large as 0
  if ((bits & kExponent) == kExponent) order = ~0u;
  return uint64_t{order} << 32 | ~static_cast<uint32_t>(c.token);
}

struct Part {
  const float* logits;
  int first_token;

  VPTQ_DEVICE Candidate operator[](int i) const { return {first_token + i, logits[i]}; }
};

struct Digit {
  uint32_t value;
  uint32_t n_above;  // keys with larger ones
  uint32_t n_keys;   // with this one
};

// The digit of the key that is the n_wanted-th from above, by one warp: a lane looks at kDigits / kWarp counts.
VPTQ_DEVICE void find_digit(const uint32_t* counts, uint32_t n_wanted, Digit& found) {
  constexpr int kEach = kDigits / kWarp;
  const int lane = threadIdx.x, first = kDigits - 1 - lane * kEach;
  uint32_t n = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) n += counts[first - i];
  uint32_t n_up_to = n;  // of this lane's digits and of those above
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t others = shuffle(n_up_to, lane - distance);
    if (lane >= distance) n_up_to += others;
  }
  uint32_t n_above = n_up_to - n;
  if (n_above >= n_wanted || n_up_to < n_wanted) return;
  uint32_t digit = first;
  while (n_above + counts[digit] < n_wanted) n_above += counts[digit--];
  found = {digit, n_above, counts[digit]};
}

// Of n items the k that have the largest keys, in any order, by a radix select: digit by digit, from the highest, it
// finds the key of the k-th, until all keys that begin as that one are wanted. Of fewer than k items all, and then
// such as stand for no token.
template <class Items>
VPTQ_DEVICE void take_largest(const Items& items, int n, int k, Candidate* out) {
  __shared__ uint32_t counts[kDigits], n_taken;
  __shared__ Digit found;
  const int thread = threadIdx.x;
  if (thread == 0) n_taken = 0;
  uint64_t least = 0, known = 0;  // the key that is looked for, as far as it is known, and the mask of these bits
  uint32_t n_wanted = smaller(k, n), n_keys = n;  // of those that begin like it
  for (int shift = 64 - kDigitBits; n_keys > n_wanted; shift -= kDigitBits) {
    if (thread < kDigits) counts[thread] = 0;
    sync_block();
#pragma unroll 4
    for (int i = thread; i < n; i += kThreads) {
      const uint64_t key = key_of(items[i]);
      if ((key & known) == least) add_shared(&counts[key >> shift & (kDigits - 1)], 1);
    }
    sync_block();
    if (thread < kWarp) find_digit(counts, n_wanted, found);
    sync_block();
    least |= uint64_t{found.value} << shift;
    known |= uint64_t{kDigits - 1} << shift;
    n_wanted -= found.n_above;
    n_keys = found.n_keys;
  }
  sync_block();
#pragma unroll 4
  for (int i = thread; i < n; i += kThreads) {
    const Candidate item = items[i];
    if (key_of(item) >= least) out[add_shared(&n_taken, 1)] = item;
  }
  for (int i = n + thread; i < k; i += kThreads) out[i] = {-1, 0.0f};
}

// found (n, n_parts, k)
__global__ void __launch_bounds__(kThreads) parts_kernel(const float* logits, int n_vocab, int k, Candidate* found) {
  const int first = int(blockIdx.x) * kPart;
  const Part part{logits + int64_t{blockIdx.y} * n_vocab + first, first};
  take_largest(part, smaller(kPart, n_vocab - first), k, found + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * k);
}

// of_parts (n, n_of_parts), tokens (n, n_tokens), found (n, k + n_tokens)
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const float* logits, int n_vocab, const Candidate* of_parts, int n_of_parts, int k,
                const int32_t* tokens, int n_tokens, Candidate* found) {
  const int64_t row = blockIdx.x;
  Candidate* out = found + row * (k + n_tokens);
  for (int i = threadIdx.x; i < n_tokens; i += kThreads) {
    const int32_t token = tokens[row * n_tokens + i];
    out[k + i] = {token, logits[row * n_vocab + token]};
  }
  take_largest(of_parts + row * n_of_parts, n_of_parts, k, out);
}

}  // namespace

int top_logits_parts(int n_vocab) { return (n_vocab + kPart - 1) / kPart; }

void top_logits(const float* logits, int n, int n_vocab, int n_largest, const int32_t* tokens, int n_tokens,
                Candidate* found, Candidate* workspace, Stream stream) {
  if (n == 0) return;
  const int n_parts = top_logits_parts(n_vocab);
  launch(parts_kernel, {dim3(n_parts, n), dim3(kThreads)}, stream, logits, n_vocab, n_largest, workspace);
  launch(rows_kernel, {dim3(n), dim3(kThreads)}, stream, logits, n_vocab, workspace, n_parts * n_largest, n_largest,
         tokens, n_tokens, found);
}

}  // namespace vptq::cuda
