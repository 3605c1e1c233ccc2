// SPDX-License-Identifier: Apache-2.0
// The end of a query: its softmax state joined with attention computed elsewhere, as weights of the two outputs.
#pragma once

#include "kernels/common/softmax.cuh"
#include "kernels/common/types.cuh"
#include "kernels/ragged_attention/ragged_attention.h"

namespace uncomp::kernels {

/// out = own * unnormalised + other * other_out
struct QueryFinish {
  float own, other, lse;
  int64_t other_offset;  // of other_out's first channel, elements
};

__device__ __forceinline__ QueryFinish finish_query(const RaggedAttentionParams& params, int64_t sequence, int64_t head,
                                                    int64_t token, float top, float sum) {
  float other = -INFINITY;
  QueryFinish finish{};
  if (params.other_lse != nullptr) {
    const Strides3& l = params.other_lse_strides;
    const Strides3& o = params.other_out_strides;
    other = params.other_lse[sequence * l.batch + head * l.head + token * l.token] * kLog2E;
    finish.other_offset = sequence * o.batch + head * o.head + token * o.token;
  }
  const float best = fmaxf(top, other), base = finite_or_zero(best);
  const float own_weight = exp2f(top - base), other_weight = exp2f(other - base);
  const float total = sum * own_weight + other_weight;
  finish.own = total == 0.0f ? 0.0f : own_weight / total;
  finish.other = total == 0.0f ? 0.0f : other_weight / total;
  finish.lse = log_sum_exp(best, total);
  return finish;
}

/// One channel of the result; a part without weight is not read.
template <class T>
__device__ __forceinline__ float finish_channel(const RaggedAttentionParams& params, const QueryFinish& finish,
                                                int channel, float unnormalised) {
  const float own = finish.own == 0.0f ? 0.0f : finish.own * unnormalised;
  // Without another part the weight is 0, or NaN where the own part is NaN.
  if (params.other_out == nullptr || finish.other == 0.0f) return own;
  return own + finish.other * to_float(static_cast<const T*>(params.other_out)[finish.other_offset + channel]);
}

}  // namespace uncomp::kernels
