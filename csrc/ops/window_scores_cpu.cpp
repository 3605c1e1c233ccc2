// SPDX-License-Identifier: Apache-2.0
// window_scores: CPU body. Rows are cut into chunks of keys. The first pass makes the weights of a chunk against the
// chunk's own largest logit; once the lse of every query is known, the second pass scales and adds them. Weights stay
// in a workspace of fixed size between the passes; what does not fit is computed a second time, to the same bits.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/window.h"
#include "cpu/loops.h"
#include "ops/arena.h"
#include "ops/threads.h"
#include "ops/window_scores.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "window_scores";
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using Optional = std::optional<at::Tensor>;

/// Keys of a chunk.
constexpr int32_t kChunk = 256;
/// Weights that are kept between the passes: 16 MiB.
constexpr int64_t kKeptWeights = int64_t{1} << 22;

/// Where the tokens of all rows lie.
struct Tokens {
  const char* data;
  Strides3 stride;  // elements
  int64_t element_bytes;
  int32_t dim;

  explicit Tokens(const at::Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())),
        stride(t.dim() == 2 ? Strides3{0, 0, t.stride(0)} : Strides3{t.stride(0), t.stride(1), t.stride(2)}),
        element_bytes(t.element_size()),
        dim(static_cast<int32_t>(t.size(-1))) {}
  const void* at(const TokenRows& rows, int32_t row, int64_t token) const {
    return data + (rows.offset(row, stride) + token * stride.token) * element_bytes;
  }
};

/// What a query has seen once the first pass is over.
struct Seen {
  float largest, total;
};

class Scorer {
 public:
  Scorer(const WindowScoresPlan& plan, const TokenRows& rows, const at::Tensor& query, const at::Tensor& key,
         const Optional& value, double scale, float* scores, float* lse)
      : plan_(plan),
        rows_(rows),
        loops_(cpu::loops()),
        of_dtype_(loops_[kernel_dtype(query)]),
        key_(key),
        value_(value.value_or(key)),
        weigh_values_(value.has_value()),
        num_queries_(plan.group_size * plan.window),
        scale_(static_cast<float>(scale)),
        query_(query.to(at::kFloat).contiguous()),
        scores_(scores),
        lse_(lse) {
    int64_t wanted = 0;
    for (int32_t r = 0; r < plan.num_rows; ++r) wanted += row_weights(r);
    workspace_ = at::empty({std::min(wanted, kKeptWeights)}, query_.options());
    kept_weights_ = workspace_.mutable_data_ptr<float>();
  }

  /// Weights of a row, whole chunks.
  int64_t row_weights(int32_t row) const { return ceil_div<int64_t>(rows_.count(row), kChunk) * kChunk * num_queries_; }

  /// Scores and lse of rows begin .. end - 1.
  void score(int32_t begin, int32_t end) {
    chunks_.clear();
    first_chunk_.assign(1, 0);
    int64_t keys = 0;
    for (int32_t r = begin; r < end; ++r) {
      const int32_t n = rows_.count(r);
      keys += n;
      for (int32_t first = 0; first < n; first += kChunk) chunks_.push_back({r, first, std::min(kChunk, n - first)});
      first_chunk_.push_back(static_cast<int64_t>(chunks_.size()));
    }
    const int64_t chunks = static_cast<int64_t>(chunks_.size());
    const int64_t threads = shared_by(chunks, threads_for(keys * plan_.head_dim * ceil_div(num_queries_, 4)));
    const auto f32 = query_.options();
    kept_ = std::min(chunks, kKeptWeights / (int64_t{num_queries_} * kChunk));
    const at::Tensor parts = at::empty({chunks * num_queries_ * 2}, f32);
    const at::Tensor seen = at::empty({(end - begin) * num_queries_ * 2}, f32);
    const int64_t again = kept_ < chunks ? int64_t{num_queries_} * kChunk : 0;
    scratch_floats_ = again + int64_t{cpu::kKeyTile} * plan_.head_dim + num_queries_ + 2 * kChunk;
    const at::Tensor scratch = at::empty({threads * scratch_floats_}, f32);
    parts_ = parts.mutable_data_ptr<float>();
    seen_ = reinterpret_cast<Seen*>(seen.mutable_data_ptr<float>());
    scratch_ = scratch.mutable_data_ptr<float>();
    share(chunks, threads, [&](int64_t c, int64_t thread) { weigh(c, thread); });
    for (int32_t r = begin; r < end; ++r) merge(r, r - begin);
    share(chunks, threads, [&](int64_t c, int64_t thread) { add(c, chunks_[c].row - begin, thread); });
  }

 private:
  struct Chunk {
    int32_t row, first, count;
  };

  /// Keys of a chunk that query i of the window sees.
  int32_t visible(const Chunk& chunk, int32_t i) const {
    const int32_t newest = newest_visible(rows_.count(chunk.row), plan_.window, i);
    return std::clamp(newest + 1 - chunk.first, 0, chunk.count);
  }
  float* scratch(int64_t thread) const { return scratch_ + thread * scratch_floats_; }
  float* tile(int64_t thread) const {
    return scratch(thread + 1) - int64_t{cpu::kKeyTile} * plan_.head_dim - num_queries_ - 2 * kChunk;
  }
  float* weights(int64_t c, int64_t thread) const {
    return c < kept_ ? kept_weights_ + c * num_queries_ * kChunk : scratch(thread);
  }
  float* largest(int64_t c) const { return parts_ + c * num_queries_ * 2; }
  float* total(int64_t c) const { return largest(c) + num_queries_; }

  /// First pass over a chunk: weights [Q, kChunk] with what each query saw of it.
  void weigh(int64_t c, int64_t thread) const {
    const Chunk& chunk = chunks_[c];
    float* weight = weights(c, thread);
    const float* query = query_.const_data_ptr<float>() + int64_t{chunk.row} * num_queries_ * plan_.head_dim;
    of_dtype_.logits({query, key_.at(rows_, chunk.row, chunk.first), key_.stride.token, num_queries_, chunk.count,
                      plan_.head_dim, scale_, weight, kChunk, tile(thread)});
    for (int32_t q = 0; q < num_queries_; ++q) {
      loops_.softmax(
          {weight + int64_t{q} * kChunk, visible(chunk, q % plan_.window), chunk.count, largest(c) + q, total(c) + q});
    }
  }

  /// The lse of every query of a row, chunk after chunk.
  void merge(int32_t row, int32_t place) const {
    for (int32_t q = 0; q < num_queries_; ++q) {
      float most = -kInfinity, sum = 0.0f;
      for (int64_t c = first_chunk_[place]; c < first_chunk_[place + 1]; ++c) most = std::max(most, largest(c)[q]);
      const float base = most == -kInfinity ? 0.0f : most;
      for (int64_t c = first_chunk_[place]; c < first_chunk_[place + 1]; ++c) {
        sum += total(c)[q] * std::exp(largest(c)[q] - base);
      }
      seen_[int64_t{place} * num_queries_ + q] = {base, sum};
      lse_[int64_t{row} * num_queries_ + q] = sum == 0.0f ? -kInfinity : base + std::log(sum);
    }
  }

  /// Second pass over a chunk: scores of its keys.
  void add(int64_t c, int32_t place, int64_t thread) const {
    const Chunk& chunk = chunks_[c];
    const int32_t count = std::min(chunk.count, plan_.width - chunk.first), tokens = rows_.count(chunk.row);
    if (count <= 0) return;
    if (c >= kept_) weigh(c, thread);
    const float* weight = weights(c, thread);
    float* factor = tile(thread) + int64_t{cpu::kKeyTile} * plan_.head_dim;
    float *of_head = factor + num_queries_, *norm = of_head + kChunk;
    const int32_t window = plan_.window, group = plan_.group_size;
    float share = plan_.reduce_window == Reduce::mean ? 1.0f / static_cast<float>(std::min(window, tokens)) : 1.0f;
    if (plan_.reduce_group == Reduce::mean) share /= static_cast<float>(group);
    for (int32_t q = 0; q < num_queries_; ++q) {
      const Seen& seen = seen_[int64_t{place} * num_queries_ + q];
      const bool exists = newest_visible(tokens, window, q % window) >= 0;
      const float scaled = std::exp(largest(c)[q] - seen.largest) / seen.total * share;
      // A query without any finite logit has no softmax.
      factor[q] = !exists ? 0.0f : (seen.total == 0.0f ? kNaN : scaled);
    }
    if (weigh_values_) {
      const void* values = value_.at(rows_, chunk.row, chunk.first);
      of_dtype_.norms(values, value_.stride.token, count, value_.dim, norm);
    }
    const bool by_head = plan_.reduce_group == Reduce::none || plan_.reduce_group == Reduce::max;
    const int32_t heads = by_head ? 1 : group;  // that are added at once
    for (int32_t h = 0; h < group; h += heads) {
      const int64_t score_row = plan_.reduce_group == Reduce::none ? int64_t{chunk.row} * group + h : chunk.row;
      float* out = scores_ + score_row * plan_.width + chunk.first;
      float* sums = plan_.reduce_group == Reduce::max && h > 0 ? of_head : out;
      add_queries(chunk, weight, factor, h * window, heads * window, count, sums);
      if (sums != out) {
        for (int32_t j = 0; j < count; ++j) out[j] = sums[j] > out[j] || std::isnan(sums[j]) ? sums[j] : out[j];
      }
      const bool last = plan_.reduce_group != Reduce::max || h + 1 == group;
      for (int32_t j = 0; weigh_values_ && last && j < count; ++j) out[j] *= norm[j];
    }
  }

  /// out[j] = sum over `queries` queries from `first` on of weight times factor, over those that see key j.
  void add_queries(const Chunk& chunk, const float* weight, const float* factor, int32_t first, int32_t queries,
                   int32_t count, float* out) const {
    const float* from = weight + int64_t{first} * kChunk;
    const int32_t oldest = newest_visible(rows_.count(chunk.row), plan_.window, 0);
    if (oldest + 1 >= chunk.first + count) {  // all queries see all keys
      return loops_.weighted_sum(from, kChunk, factor + first, queries, count, out);
    }
    // A factor may be NaN, so a weight of 0 is not enough to hide a key.
    std::fill_n(out, count, 0.0f);
    for (int32_t q = 0; q < queries; ++q, from += kChunk) {
      const int32_t sees = std::min(visible(chunk, (first + q) % plan_.window), count);
      for (int32_t j = 0; j < sees; ++j) out[j] += from[j] * factor[first + q];
    }
  }

  const WindowScoresPlan& plan_;
  const TokenRows& rows_;
  const cpu::Loops& loops_;
  const cpu::OfDType& of_dtype_;
  Tokens key_, value_;
  bool weigh_values_;
  int32_t num_queries_;  // of a row
  float scale_;
  at::Tensor query_;  // [B, Hq, W, D] float32: the queries of a row lie together
  at::Tensor workspace_;
  float *scores_, *lse_;

  std::vector<Chunk> chunks_;
  std::vector<int64_t> first_chunk_;  // of each row, and the end
  int64_t kept_ = 0;                  // chunks whose weights are kept
  int64_t scratch_floats_ = 0;        // of a thread: weights, tile of keys, factors, sums of a head, norms
  float *kept_weights_ = nullptr, *parts_ = nullptr, *scratch_ = nullptr;
  Seen* seen_ = nullptr;
};

/// Raises what only the data shows.
void check_tokens(const ValidTokens& valid, int32_t batch) {
  for (int32_t b = 0; b < batch; ++b) {
    const int64_t from = valid.first == nullptr ? 0 : valid.first[b];
    UNCOMP_CHECK_VALUE(kOp, from >= 0 && from <= valid.seq_len, "first must lie in [0, ", valid.seq_len, "]; got ",
                       from, " for sequence ", b);
    const int64_t tokens = valid.length == nullptr ? 0 : valid.length[b];
    UNCOMP_CHECK_VALUE(kOp, tokens >= 0 && from + tokens <= valid.seq_len, "length must lie in [0, ",
                       valid.seq_len - from, "] behind first; got ", tokens, " for sequence ", b);
  }
}

std::tuple<at::Tensor, at::Tensor> window_scores_cpu(const at::Tensor& query, const at::Tensor& key,
                                                     const Optional& value, const Optional& first,
                                                     const Optional& length, const Optional& row_start,
                                                     const Optional& row_len, int64_t columns, double scale,
                                                     c10::string_view reduce_window, c10::string_view reduce_group) {
  const WindowScoresPlan plan = check_window_scores(query, key, value, first, length, row_start, row_len, columns,
                                                    scale, reduce_window, reduce_group);
  TokenRows rows{};
  rows.rows_per_sequence = plan.rows_per_sequence;
  if (plan.arena) {
    rows.arena = checked_rows(kOp, *row_start, *row_len, key.size(0));
  } else {
    rows.dense = {data_or_null<int32_t>(first), data_or_null<int32_t>(length), static_cast<int32_t>(key.size(2))};
    check_tokens(rows.dense, plan.batch);
  }
  const auto f32 = query.options().dtype(at::kFloat);
  at::Tensor scores = at::zeros({plan.score_rows, plan.width}, f32);
  at::Tensor lse = at::empty({plan.batch, plan.num_q_heads, plan.window}, f32);
  Scorer scorer(plan, rows, query, key, value, scale, scores.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>());
  // As many rows at a time as the kept weights serve, so that few weights are computed twice.
  for (int32_t begin = 0, end = 0; begin < plan.num_rows; begin = end) {
    int64_t wanted = scorer.row_weights(end++);
    while (end < plan.num_rows && (wanted += scorer.row_weights(end)) <= kKeptWeights) ++end;
    scorer.score(begin, end);
  }
  return {scores, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("window_scores", &window_scores_cpu); }

}  // namespace
}  // namespace uncomp
