// SPDX-License-Identifier: Apache-2.0
// Attention of one query token over ragged rows on CPU threads, shared by decode_attention and decode_evict_.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <vector>

#include "core/ragged.h"
#include "cpu/loops.h"
#include "cpu/pieces.h"
#include "ops/arena.h"
#include "ops/key_transform.h"

namespace uncomp {

/// The rows of one call cut into pieces, and room for what attention leaves of each. `extra` partial results of tokens
/// elsewhere may follow the pieces of a row. With `maker`, which must outlive this, key_rows holds latents; a piece has
/// its keys made when it is attended to.
class DecodeRows {
 public:
  DecodeRows(const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows, const RaggedRows& rows,
             const HeadLayout& layout, double scale, int32_t extra, const KeyMaker* maker = nullptr);

  /// Attends over all pieces. weights_of(row) is where the weights of a row go, [g, weight_stride(row)], or null.
  /// finish(row) runs on any thread once the row's last piece is done; it must not call torch operators.
  void attend(c10::function_ref<float*(int32_t row)> weights_of, c10::function_ref<void(int32_t row)> finish);

  /// Partial result pieces(row) + which, from one token elsewhere; its weight for head h goes to weights[h * stride].
  /// `position` is read by the maker.
  void attend_extra(int32_t row, int32_t which, const void* key, const void* value, float* weights, int64_t stride,
                    const int32_t* position = nullptr);

  /// Merges the first `count` partial results of a row into its heads of out [B, Hq, 1, Dv] and lse [B, Hq]. After
  /// that weight[h, j] * factors[h] is the softmax weight of a token, 0 where no logit was above -inf.
  void merge(int32_t row, int32_t count, void* out, float* lse);
  const float* factors(int32_t row, int32_t which) const { return partial(row, which); }

  int32_t pieces(int32_t row) const { return first_piece_[row + 1] - first_piece_[row]; }
  const cpu::Piece& piece(int32_t row, int32_t which) const { return pieces_[first_piece_[row] + which]; }
  int64_t weight_stride(int32_t row) const { return int64_t{rows_.len(row)} + extra_; }

 private:
  /// largest [g], which merge turns into factors; total [g]; sum [g, Dv].
  float* partial(int32_t row, int32_t which) const {
    return partials_ + (int64_t{first_piece_[row]} + int64_t{row} * extra_ + which) * partial_floats_;
  }
  /// `made` [count, Dk] is where keys are made.
  void run(int32_t row, int32_t which, const void* keys, const void* values, const int32_t* position, int32_t count,
           float* weights, int64_t weight_stride, float* made) const;

  const cpu::OfDType& loops_;
  RaggedRows rows_;
  const KeyMaker* maker_;
  int32_t group_size_, stored_dim_, key_dim_, value_dim_, extra_;  // stored_dim_ is the width of key_rows
  float scale_;
  at::Tensor query_, key_rows_, value_rows_;  // query_ [R, g, Dk] float32
  at::Tensor workspace_;
  float* partials_;
  int64_t partial_floats_;
  std::vector<cpu::Piece> pieces_;
  std::vector<int32_t> first_piece_;  // [R + 1]
};

}  // namespace uncomp
