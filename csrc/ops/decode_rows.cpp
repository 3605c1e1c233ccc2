// SPDX-License-Identifier: Apache-2.0
// Attention of one query token over ragged rows on CPU threads.
#include "ops/decode_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <cmath>
#include <limits>

#include "ops/threads.h"

namespace uncomp {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

}  // namespace

DecodeRows::DecodeRows(const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows,
                       const RaggedRows& rows, const HeadLayout& layout, double scale, int32_t extra,
                       const KeyMaker* maker)
    : loops_(cpu::loops()[kernel_dtype(query)]),
      rows_(rows),
      maker_(maker),
      group_size_(layout.group_size),
      stored_dim_(static_cast<int32_t>(key_rows.size(1))),
      key_dim_(static_cast<int32_t>(query.size(3))),
      value_dim_(static_cast<int32_t>(value_rows.size(1))),
      extra_(extra),
      scale_(static_cast<float>(scale)),
      query_(query.to(at::kFloat).contiguous()),
      key_rows_(key_rows),
      value_rows_(value_rows),
      partial_floats_(int64_t{layout.group_size} * (2 + value_rows.size(1))) {
  first_piece_.reserve(rows.num_rows + 1);
  for (int32_t r = 0; r < rows.num_rows; ++r) {
    const int32_t len = rows.len(r);
    const int32_t tokens = maker_ == nullptr ? cpu::piece_tokens(len, group_size_) : cpu::kMadeTokens;
    first_piece_.push_back(static_cast<int32_t>(pieces_.size()));
    for (int32_t i = 0; i < cpu::num_pieces(len, tokens); ++i) {
      pieces_.push_back({r, i * tokens, i * tokens + min_of(tokens, len - i * tokens)});
    }
  }
  first_piece_.push_back(static_cast<int32_t>(pieces_.size()));
  const int64_t partials = static_cast<int64_t>(pieces_.size()) + int64_t{rows.num_rows} * extra;
  workspace_ = at::empty({partials * partial_floats_}, query_.options());
  partials_ = workspace_.mutable_data_ptr<float>();
}

void DecodeRows::run(int32_t row, int32_t which, const void* keys, const void* values, const int32_t* position,
                     int32_t count, float* weights, int64_t weight_stride, float* made) const {
  float* to = partial(row, which);
  const float* query = query_.const_data_ptr<float>() + int64_t{row} * group_size_ * key_dim_;
  auto* attend = loops_.attend;
  if (maker_ != nullptr) {
    maker_->make(row, keys, position, count, made);
    keys = made;
    attend = loops_.attend_made;
  }
  attend({query, keys, values, count, group_size_, key_dim_, value_dim_, scale_, weights, weight_stride, to,
          to + group_size_, to + 2 * group_size_});
}

void DecodeRows::attend(c10::function_ref<float*(int32_t row)> weights_of,
                        c10::function_ref<void(int32_t row)> finish) {
  const int64_t tasks = static_cast<int64_t>(pieces_.size()), element = key_rows_.element_size();
  int64_t live = 0, longest = 0;
  for (const cpu::Piece& piece : pieces_) {
    live += piece.end - piece.first;
    longest = max_of<int64_t>(longest, piece.end - piece.first);
  }
  const int64_t of_token = maker_ == nullptr ? key_dim_ : int64_t{key_dim_} * stored_dim_ / 8;  // work
  const int64_t threads = shared_by(tasks, threads_for(live * (of_token + value_dim_)));
  const int64_t made_floats = maker_ == nullptr ? 0 : longest * key_dim_;
  const int64_t floats = group_size_ * longest + made_floats;
  const at::Tensor scratch = at::empty({threads, floats}, query_.options());
  float* of_thread = scratch.mutable_data_ptr<float>();
  const char* keys = static_cast<const char*>(key_rows_.const_data_ptr());
  const char* values = static_cast<const char*>(value_rows_.const_data_ptr());
  std::vector<std::atomic<int32_t>> left(rows_.num_rows);
  for (int32_t r = 0; r < rows_.num_rows; ++r) left[r].store(pieces(r), std::memory_order_relaxed);

  share(tasks, threads, [&](int64_t task, int64_t thread) {
    const cpu::Piece& piece = pieces_[task];
    const int32_t row = piece.row, count = piece.end - piece.first;
    const int64_t slot = rows_.start(row) + piece.first;
    float* weights = weights_of(row);
    const bool wanted = weights != nullptr;
    float* mine = of_thread + thread * floats;
    run(row, static_cast<int32_t>(task) - first_piece_[row], keys + slot * stored_dim_ * element,
        values + slot * value_dim_ * element, maker_ == nullptr ? nullptr : maker_->positions(slot), count,
        wanted ? weights + piece.first : mine + made_floats, wanted ? weight_stride(row) : longest, mine);
    if (left[row].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(row);
  });
}

void DecodeRows::attend_extra(int32_t row, int32_t which, const void* key, const void* value, float* weights,
                              int64_t stride, const int32_t* position) {
  float made[kMaxHeadDim];
  run(row, pieces(row) + which, key, value, position, 1, weights, stride, made);
}

void DecodeRows::merge(int32_t row, int32_t count, void* out, float* lse) {
  std::vector<float> sum(value_dim_);
  for (int32_t h = 0; h < group_size_; ++h) {
    float largest = -kInf, total = 0.0f;
    for (int32_t i = 0; i < count; ++i) largest = max_of(largest, partial(row, i)[h]);
    const float base = largest == -kInf ? 0.0f : largest;
    for (int32_t i = 0; i < count; ++i) {
      float* part = partial(row, i);
      part[h] = std::exp(part[h] - base);
      total += part[h] * part[group_size_ + h];
    }
    const int64_t head = int64_t{row} * group_size_ + h;
    lse[head] = total == 0.0f ? -kInf : base + std::log(total);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int32_t i = 0; i < count; ++i) {
      float* part = partial(row, i);
      part[h] = total == 0.0f ? 0.0f : part[h] / total;
      const float factor = part[h];
      const float* from = part + 2 * group_size_ + int64_t{h} * value_dim_;
      for (int32_t d = 0; d < value_dim_; ++d) sum[d] += factor * from[d];
    }
    if (total == 0.0f) std::fill(sum.begin(), sum.end(), 0.0f);
    AT_DISPATCH_SWITCH(key_rows_.scalar_type(), "merge", AT_DISPATCH_CASE(at::kFloat, [&] {
                         for (int32_t d = 0; d < value_dim_; ++d)
                           static_cast<scalar_t*>(out)[head * value_dim_ + d] = sum[d];
                       }) AT_DISPATCH_CASE(at::kHalf, [&] {
                         for (int32_t d = 0; d < value_dim_; ++d)
                           static_cast<scalar_t*>(out)[head * value_dim_ + d] = sum[d];
                       }) AT_DISPATCH_CASE(at::kBFloat16, [&] {
                         for (int32_t d = 0; d < value_dim_; ++d)
                           static_cast<scalar_t*>(out)[head * value_dim_ + d] = sum[d];
                       }));
  }
}

}  // namespace uncomp
