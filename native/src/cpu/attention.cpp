#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace vptq::cpu {
namespace {

// A row's positions are taken in spans of so many, and the spans' sums are added up in order. So it does not matter
// to the numbers whether one thread takes all spans or each another one.
constexpr int kSpan = 512;
constexpr int kSpanBlocks = kSpan / KvLayout::kBlockTokens;

// Threads share a row's spans where there are fewer items than these for each of them, and the sums of all spans
// (some 0.5 KiB each) are not too many.
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kMostSums = 1 << 15;

constexpr int64_t kTotalPlace = 0;  // where in sums_ the sums over all spans come to be; behind it those of spans

int64_t sums_size(int head_dim) {
  constexpr int kUnit = KvLayout::kBlockTokens;
  return AttentionSums::kValues + (head_dim + kUnit - 1) / kUnit * kUnit;
}

void clear(float* sums, int64_t size) {
  std::fill(sums, sums + size, 0.0f);
  sums[AttentionSums::kLargest] = -std::numeric_limits<float>::infinity();
}

void add_sums(const float* from, int64_t size, float* to) {
  constexpr int kLargest = AttentionSums::kLargest;
  const float largest = std::max(from[kLargest], to[kLargest]);
  const float keep = std::exp(to[kLargest] - largest), share = std::exp(from[kLargest] - largest);
  for (int64_t i = AttentionSums::kTotal; i < size; ++i) to[i] = to[i] * keep + from[i] * share;
  to[kLargest] = largest;
}

}  // namespace

struct Attention::Call {
  const Batch& batch;
  const KvLayout& layout;
  int layer, n_head, window;
  const float* q;
  float* out;
  int heads;  // query heads of a kv head that share a look
  int parts;  // into which that splits a kv head's query heads

  int first_position(int t) const { return window > 0 ? std::max(0, batch.positions[t] - window + 1) : 0; }
  int first_span(const Tokens& tokens) const { return first_position(tokens.begin) / kSpan; }
  int end_span(const Tokens& tokens) const { return batch.positions[tokens.end - 1] / kSpan + 1; }
};

// What one thread computes.
struct Attention::Item {
  int first_span, end_span;
  AttentionRows rows;
  int64_t row[AttentionRows::kMost];  // token * n_head + query head
};

void Attention::run(const Batch& batch, const KvLayout& layout, int layer, int n_head, int window, const float* q,
                    float* out) {
  const int per_kv = n_head / layout.n_head_kv, heads = std::min(per_kv, AttentionRows::kMost);
  const Call call{batch, layout, layer, n_head, window, q, out, heads, (per_kv + heads - 1) / heads};
  share_out(batch, AttentionRows::kMost / heads);
  const int64_t n_items = int64_t(tokens_.size()) * layout.n_head_kv * call.parts;
  const int64_t n_rows = int64_t{batch.n()} * n_head;
  int64_t n_spans = 0, seen = 0;  // by the longest item
  for (const Tokens& t : tokens_) {
    n_spans = std::max<int64_t>(n_spans, call.end_span(t) - call.first_span(t));
    seen = std::max<int64_t>(seen, batch.positions[t.end - 1] + 1 - call.first_position(t.begin));
  }
  const bool spans_shared = n_spans > 1 && n_items < kItemsPerThread * threads_.size() && n_spans * n_rows <= kMostSums;
  const int64_t places = 1 + (spans_shared ? n_spans : 1);
  if (const size_t size = places * n_rows * sums_size(layout.head_dim); sums_.size() < size) sums_.resize(size);

  const int64_t work = 2 * layout.head_dim * seen * ((n_rows + n_items - 1) / n_items);
  if (spans_shared)
    threads_.parallel_for(n_items * n_spans, (work + n_spans - 1) / n_spans, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Item it = item(call, i / n_spans);
        const int64_t place = i % n_spans, span = it.first_span + place;
        if (span < it.end_span) attend(call, it, int(span), 1 + place);
      }
    });
  threads_.parallel_for(n_items, spans_shared ? n_spans * layout.head_dim : work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Item it = item(call, i);
      for (int r = 0; r < it.rows.n; ++r) clear(sums(call, kTotalPlace, it.row[r]), sums_size(layout.head_dim));
      for (int span = it.first_span; span < it.end_span; ++span) {
        if (!spans_shared) attend(call, it, span, 1);
        add(call, it, span, spans_shared ? 1 + span - it.first_span : 1);
      }
      finish(call, it);
    }
  });
}

void Attention::share_out(const Batch& batch, int most_tokens) {
  tokens_.clear();
  for (int t = 0; t < batch.n(); ++t)
    if (t == 0 || batch.sequences[t] != batch.sequences[t - 1] || t - tokens_.back().begin == most_tokens)
      tokens_.push_back({t, t + 1});
    else
      tokens_.back().end = t + 1;
}

Attention::Item Attention::item(const Call& call, int64_t i) const {
  const KvLayout& layout = call.layout;
  const int per_kv = call.n_head / layout.n_head_kv;
  const auto part = int(i % call.parts), kv_head = int(i / call.parts % layout.n_head_kv);
  const Tokens& tokens = tokens_[i / call.parts / layout.n_head_kv];
  Item it;
  it.first_span = call.first_span(tokens);
  it.end_span = call.end_span(tokens);
  AttentionRows& rows = it.rows;
  rows.type = layout.type;
  rows.head_dim = layout.head_dim;
  rows.blocks = call.batch.blocks.data() + call.batch.first_block[call.batch.sequences[tokens.begin]];
  rows.key_offset = call.layer * layout.layer_bytes() + kv_head * layout.head_bytes();
  rows.value_offset = rows.key_offset + layout.layer_bytes() / 2;
  rows.n = 0;
  for (int t = tokens.begin; t < tokens.end; ++t)
    for (int h = part * call.heads; h < std::min((part + 1) * call.heads, per_kv); ++h) {
      it.row[rows.n] = int64_t{t} * call.n_head + kv_head * per_kv + h;
      rows.q[rows.n] = call.q + it.row[rows.n] * layout.head_dim;
      rows.first[rows.n] = call.first_position(t);
      rows.last[rows.n++] = call.batch.positions[t];
    }
  return it;
}

float* Attention::sums(const Call& call, int64_t place, int64_t row) {
  return sums_.data() + (place * call.batch.n() * call.n_head + row) * sums_size(call.layout.head_dim);
}

void Attention::attend(const Call& call, Item& item, int span, int64_t place) {
  for (int r = 0; r < item.rows.n; ++r) item.rows.sums[r] = sums(call, place, item.row[r]);
  kernels_.attend(item.rows, span * kSpanBlocks, (span + 1) * kSpanBlocks);
}

// Adds a span's sums to the total of the rows that see something of it.
void Attention::add(const Call& call, const Item& item, int span, int64_t place) {
  for (int r = 0; r < item.rows.n; ++r)
    if (item.rows.first[r] / kSpan <= span && span <= item.rows.last[r] / kSpan)
      add_sums(sums(call, place, item.row[r]), sums_size(call.layout.head_dim), sums(call, kTotalPlace, item.row[r]));
}

void Attention::finish(const Call& call, const Item& item) {
  const int head_dim = call.layout.head_dim;
  for (int r = 0; r < item.rows.n; ++r) {
    const float* total = sums(call, kTotalPlace, item.row[r]);
    float* out = call.out + item.row[r] * head_dim;
    for (int d = 0; d < head_dim; ++d) out[d] = total[AttentionSums::kValues + d] / total[AttentionSums::kTotal];
  }
}

}  // namespace vptq::cpu
