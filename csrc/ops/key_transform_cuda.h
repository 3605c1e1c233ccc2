// SPDX-License-Identifier: Apache-2.0
// The key transform as kernels take it.
#pragma once

#include "kernels/decode_attention/key_transform.h"
#include "ops/key_transform.h"

namespace uncomp {

/// Of a checked transform. NotImplementedError for widths that the kernels do not have.
inline kernels::KeyTransformParams key_transform_params(const char* op, const KeyTransform& transform,
                                                        int32_t rows_per_sequence) {
  const int64_t rank = transform.basis->size(1), dim = transform.basis->size(2);
  UNCOMP_CHECK_LIMIT(op, rank % 16 == 0 && rank <= kMaxLatentDim,
                     "key_basis must have a rank that is a multiple of 16 and at most ", kMaxLatentDim,
                     " on CUDA; got ", rank);
  UNCOMP_CHECK_LIMIT(op, dim % 16 == 0,
                     "key_basis must have a number of channels that is a multiple of 16 on CUDA; got ", dim);
  kernels::KeyTransformParams params{};
  params.basis = transform.basis->const_data_ptr();
  params.bias = data_or_null<float>(transform.bias);
  params.norm = data_or_null<float>(transform.norm);
  params.frequency = data_or_null<float>(transform.frequency);
  params.slot_position = data_or_null<int32_t>(transform.slot_position);
  params.position_offset = data_or_null<int32_t>(transform.position_offset);
  params.dim = static_cast<int32_t>(dim);
  params.pairs = transform.frequency.has_value() ? static_cast<int32_t>(transform.frequency->size(0)) : 0;
  params.rows_per_kv = rows_per_sequence / static_cast<int32_t>(transform.num_kv_heads());
  params.norm_eps = static_cast<float>(transform.norm_eps);
  params.rotary_scale = static_cast<float>(transform.rotary_scale);
  return params;
}

}  // namespace uncomp
