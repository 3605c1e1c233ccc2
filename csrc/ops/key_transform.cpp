// SPDX-License-Identifier: Apache-2.0
// The key transform: checks, and the keys that CPU bodies attend to.
#include "ops/key_transform.h"

#include <cmath>

#include "core/rotary.h"
#include "ops/check.h"

namespace uncomp {
namespace {

void check_float32(const char* op, const char* name, const std::optional<at::Tensor>& t, at::IntArrayRef wanted,
                   const char* shape, const at::Tensor& query) {
  if (!t.has_value()) return;
  check_dtype(op, name, *t, at::kFloat);
  check_device(op, name, *t, "query", query);
  check_shape(op, name, *t, wanted, shape);
  check_contiguous(op, name, *t);
}

}  // namespace

void check_key_transform(const char* op, const KeyTransform& transform, const at::Tensor& query,
                         const at::Tensor& key_rows, int64_t rows_per_sequence) {
  if (!transform.given()) {
    const auto absent = [&](const char* name, const std::optional<at::Tensor>& t) {
      UNCOMP_CHECK_VALUE(op, !t.has_value(), name, " must come with key_basis; got it alone");
    };
    absent("key_bias", transform.bias);
    absent("key_norm", transform.norm);
    absent("rotary_frequency", transform.frequency);
    absent("position_offset", transform.position_offset);
    return;
  }
  const at::Tensor& basis = *transform.basis;
  const int64_t dim = query.size(3), rank = key_rows.size(1);
  check_head_dim(op, "query", dim);
  check_same_dtype(op, "key_basis", basis, "query", query);
  check_device(op, "key_basis", basis, "query", query);
  check_rank(op, "key_basis", basis, 3, "[Hkv, r, D]");
  const int64_t heads = basis.size(0);
  check_shape(op, "key_basis", basis, {heads, rank, dim}, "[Hkv, r, D]");
  check_contiguous(op, "key_basis", basis);
  check_aligned(op, "key_basis", basis);
  UNCOMP_CHECK_VALUE(op, heads >= 1 && rows_per_sequence % heads == 0,
                     "key_basis must have a number of heads that divides the ", rows_per_sequence,
                     " rows of a sequence; got ", heads);
  check_float32(op, "key_bias", transform.bias, {heads, dim}, "[Hkv, D]", query);
  check_float32(op, "key_norm", transform.norm, {dim}, "[D]", query);
  UNCOMP_CHECK_VALUE(op, transform.norm_eps >= 0.0 && finite_in_float32(transform.norm_eps),
                     "key_norm_eps must be a finite number of float32 and at least 0; got ", transform.norm_eps);
  check_finite(op, "rotary_scale", transform.rotary_scale);
  check_int32(op, "slot_position", transform.slot_position, {key_rows.size(0)}, "[C]", "query", query);
  check_int32(op, "position_offset", transform.position_offset, {query.size(0)}, "[B]", "query", query);
  if (!transform.frequency.has_value()) return;
  check_rank(op, "rotary_frequency", *transform.frequency, 1, "[rot / 2]");
  const int64_t pairs = transform.frequency->size(0);
  check_float32(op, "rotary_frequency", transform.frequency, {pairs}, "[rot / 2]", query);
  UNCOMP_CHECK_VALUE(op, 2 * pairs <= dim, "rotary_frequency must turn at most the ", dim, " channels of query; got ",
                     2 * pairs);
  UNCOMP_CHECK_VALUE(op, transform.slot_position.has_value(),
                     "slot_position must come with rotary_frequency; got None");
}

KeyMaker::KeyMaker(const char* op, const KeyTransform& transform, DType dtype, int32_t rows_per_sequence)
    : loops_(cpu::loops()[dtype]),
      rows_per_sequence_(rows_per_sequence),
      rows_per_kv_(rows_per_sequence / static_cast<int32_t>(transform.num_kv_heads())),
      basis_(transform.basis->to(at::kFloat)),
      bias_(data_or_null<float>(transform.bias)),
      slot_position_(nullptr),
      position_offset_(data_or_null<int32_t>(transform.position_offset)) {
  call_.norm = data_or_null<float>(transform.norm);
  call_.norm_eps = static_cast<float>(transform.norm_eps);
  call_.rotary_scale = static_cast<float>(transform.rotary_scale);
  call_.rank = static_cast<int32_t>(basis_.size(1));
  call_.dim = static_cast<int32_t>(basis_.size(2));
  if (!transform.frequency.has_value()) return;
  slot_position_ = data_or_null<int32_t>(transform.slot_position);
  const float* frequency = transform.frequency->const_data_ptr<float>();
  call_.pairs = static_cast<int32_t>(transform.frequency->size(0));
  for (int32_t i = 0; i < call_.pairs; ++i) {
    UNCOMP_CHECK_VALUE(op, std::isfinite(frequency[i]), "rotary_frequency must be finite; got ", frequency[i],
                       " at place ", i);
    turn_.push_back(turn64(frequency[i]));
  }
  call_.turn = turn_.data();
}

void KeyMaker::make(int32_t row, const void* latents, const int32_t* position, int32_t count, float* keys) const {
  const int32_t head = row % rows_per_sequence_ / rows_per_kv_;
  cpu::MakeKeys call = call_;
  call.latents = latents;
  call.basis = basis_.const_data_ptr<float>() + int64_t{head} * call.rank * call.dim;
  call.bias = bias_ == nullptr ? nullptr : bias_ + int64_t{head} * call.dim;
  call.position = position;
  call.offset = position_offset_ == nullptr ? 0 : position_offset_[row / rows_per_sequence_];
  call.count = count;
  call.keys = keys;
  loops_.make_keys(call);
}

}  // namespace uncomp
