// SPDX-License-Identifier: Apache-2.0
// Keys that are stored as latents and made again while they are attended to: what decode_attention and decode_evict_
// are told about it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/ragged.h"
#include "cpu/loops.h"
#include "ops/arena.h"

namespace uncomp {

/// key = rotate(norm(latent * basis + bias)), D channels of r stored numbers. Without `basis` keys are stored as they
/// are, and the other tensors must be absent, but for `slot_position`, which is not read then.
///
/// basis            [Hkv, r, D]     dtype of query, contiguous, 16-byte aligned; Hkv divides the rows of a sequence,
///                                  row r of a sequence has KV head r / (rows / Hkv)
/// bias             [Hkv, D]        float32, contiguous
/// norm             [D]             float32, contiguous: key * norm / sqrt(mean(key^2) + norm_eps)
/// frequency        [rot / 2]       float32, contiguous, finite, radians a token, rot <= D: channel i turns with
/// channel
///                                  i + rot / 2, channels from rot on do not. Angles are exact to 1e-9 radians a token.
/// rotary_scale                     factor of cos and sin
/// slot_position    [C] int32       wanted where `frequency` is given
/// position_offset  [B] int32       added to the positions of a sequence
struct KeyTransform {
  const std::optional<at::Tensor>&basis, &bias, &norm;
  double norm_eps;
  const std::optional<at::Tensor>& frequency;
  double rotary_scale;
  const std::optional<at::Tensor>&slot_position, &position_offset;

  bool given() const { return basis.has_value(); }
  int64_t num_kv_heads() const { return basis->size(0); }
};

/// Raises what is said above; `query` [B, Hq, 1, D], `key_rows` [C, r], both checked.
void check_key_transform(const char* op, const KeyTransform& transform, const at::Tensor& query,
                         const at::Tensor& key_rows, int64_t rows_per_sequence);

/// Makes keys on the CPU, in float32.
class KeyMaker {
 public:
  /// ValueError for a frequency that is not finite.
  KeyMaker(const char* op, const KeyTransform& transform, DType dtype, int32_t rows_per_sequence);

  int32_t dim() const { return call_.dim; }

  /// keys [count, D] of tokens of a row; `position` [count] is read where something turns.
  void make(int32_t row, const void* latents, const int32_t* position, int32_t count, float* keys) const;

  /// Positions of an arena's slots from `slot` on; null where nothing turns.
  const int32_t* positions(int64_t slot) const { return slot_position_ == nullptr ? nullptr : slot_position_ + slot; }

 private:
  const cpu::OfDType& loops_;
  cpu::MakeKeys call_{};
  int32_t rows_per_sequence_, rows_per_kv_;
  at::Tensor basis_;
  const float* bias_;
  const int32_t *slot_position_, *position_offset_;
  std::vector<uint64_t> turn_;
};

}  // namespace uncomp
