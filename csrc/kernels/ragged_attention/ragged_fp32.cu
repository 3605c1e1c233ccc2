// SPDX-License-Identifier: Apache-2.0
// ragged_attention for fp32 rows on plain multiply-adds: a warp a query, a lane every 32nd channel. A twin without
// rounding, not a fast path.
#include "core/constants.h"
#include "kernels/common/reduce.cuh"
#include "kernels/ragged_attention/finish.cuh"
#include "kernels/ragged_attention/launch.h"

namespace uncomp::kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kLaneChannels = kMaxHeadDim / 32;

struct LaneState {
  float out[kLaneChannels], top, sum;
};

/// Adds keys 0 .. count - 1 of [.., Dk] and their values to the state.
__device__ __forceinline__ void attend(LaneState& state, const float (&query)[kLaneChannels], const float* key,
                                       int64_t key_stride, int key_dim, const float* value, int64_t value_stride,
                                       int value_dim, int32_t count, float scale_log2) {
  const int lane = threadIdx.x % 32;
  for (int32_t i = 0; i < count; ++i) {
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) {
      const int channel = lane + 32 * j;
      if (channel < key_dim) dot += query[j] * key[i * key_stride + channel];
    }
    const float logit = warp_sum(dot) * scale_log2;
    const float best = fmaxf(state.top, logit), base = finite_or_zero(best);
    const float shrink = exp2f(state.top - base), weight = exp2f(logit - base);
    state.top = best;
    state.sum = state.sum * shrink + weight;
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) {
      const int channel = lane + 32 * j;
      if (channel < value_dim) state.out[j] = state.out[j] * shrink + weight * value[i * value_stride + channel];
    }
  }
}

__global__ void __launch_bounds__(32 * kWarps)
    plain_kernel(const __grid_constant__ RaggedAttentionParams params, int64_t queries) {
  const int lane = threadIdx.x % 32;
  const int64_t query_index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (query_index >= queries) return;
  const int32_t seq_len = params.tokens.seq_len, value_dim = params.value_dim;
  const int32_t token = static_cast<int32_t>(query_index % seq_len);
  const int64_t all_heads = query_index / seq_len;
  const int32_t row = static_cast<int32_t>(all_heads / params.group_size);
  const int32_t sequence = row / params.rows_per_sequence;
  const int32_t head =
      static_cast<int32_t>(all_heads - static_cast<int64_t>(sequence) * params.rows_per_sequence * params.group_size);
  const int32_t first = params.tokens.begin(sequence), count = params.tokens.count(sequence);

  QueryFinish finish{0.0f, 0.0f, -INFINITY, 0};
  LaneState state{{}, -INFINITY, 0.0f};
  if (token >= first && token < first + count) {
    const Strides3& q = params.query_strides;
    const float* from = static_cast<const float*>(params.query) + sequence * q.batch + head * q.head + token * q.token;
    float query[kLaneChannels];
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) query[j] = lane + 32 * j < params.key_dim ? from[lane + 32 * j] : 0.0f;
    const float scale_log2 = params.scale * kLog2E;
    const int64_t slot = params.rows.start(row);
    attend(state, query, static_cast<const float*>(params.key_rows) + slot * params.key_dim, params.key_dim,
           params.key_dim, static_cast<const float*>(params.value_rows) + slot * value_dim, value_dim, value_dim,
           params.rows.len(row), scale_log2);
    if (params.key != nullptr) {
      const Strides3& k = params.key_strides;
      const Strides3& v = params.value_strides;
      const int32_t kv_head = row % params.rows_per_sequence / params.rows_per_kv_head;
      attend(state, query,
             static_cast<const float*>(params.key) + sequence * k.batch + kv_head * k.head + first * k.token, k.token,
             params.key_dim,
             static_cast<const float*>(params.value) + sequence * v.batch + kv_head * v.head + first * v.token, v.token,
             value_dim, token - first + 1, scale_log2);
    }
    finish = finish_query(params, sequence, head, token, state.top, state.sum);
  }
  if (lane == 0) params.lse[query_index] = finish.lse;
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    const int channel = lane + 32 * j;
    if (channel < value_dim) {
      static_cast<float*>(params.out)[query_index * value_dim + channel] =
          finish_channel<float>(params, finish, channel, state.out[j]);
    }
  }
}

}  // namespace

cudaError_t launch_ragged_fp32(const RaggedAttentionParams& params, const RaggedWorkspace&, cudaStream_t stream) {
  const int64_t queries = query_count(params), blocks = ceil_div<int64_t>(queries, kWarps);
  if (!fits<int32_t>(blocks)) return cudaErrorInvalidValue;
  plain_kernel<<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(params, queries);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
