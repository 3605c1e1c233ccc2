// SPDX-License-Identifier: Apache-2.0
// ragged_attention: picks how far the keys of a query tile are cut, and joins the parts in order when they were. The
// border between the two launches is the barrier.
#include <algorithm>

#include "core/constants.h"
#include "kernels/common/reduce.cuh"
#include "kernels/ragged_attention/finish.cuh"
#include "kernels/ragged_attention/launch.h"
#include "kernels/ragged_attention/warpgroups.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kJoinWarps = 4;
constexpr int kLaneChannels = kMaxHeadDim / 32;
constexpr int64_t kKeysPerPart = 256;

/// A warp joins one query: lane p looks at part p's state, then every lane sums its channels over the parts in order.
template <class T>
__global__ void __launch_bounds__(32 * kJoinWarps)
    join_kernel(const __grid_constant__ RaggedAttentionParams params, const __grid_constant__ RaggedWorkspace work,
                int64_t queries) {
  const int lane = threadIdx.x % 32;
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kJoinWarps + threadIdx.x / 32;
  if (query >= queries) return;
  const int32_t seq_len = params.tokens.seq_len, value_dim = params.value_dim;
  const int32_t heads = params.rows_per_sequence * params.group_size;
  const int64_t token = query % seq_len, head = query / seq_len % heads;
  const int32_t sequence = static_cast<int32_t>(query / seq_len / heads);
  const int32_t first = params.tokens.begin(sequence);

  QueryFinish finish{0.0f, 0.0f, -INFINITY, 0};
  float out[kLaneChannels] = {};
  if (token >= first && token < first + params.tokens.count(sequence)) {
    const float2 state = lane < work.parts ? work.state[lane * queries + query] : make_float2(-INFINITY, 0.0f);
    float top = state.x;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
    const float weight = exp2f(state.x - finite_or_zero(top));
    const float sum = warp_sum(weight * state.y);
    for (int32_t part = 0; part < work.parts; ++part) {
      const float w = __shfl_sync(kFullWarp, weight, part);
      const float* from = work.out + (part * queries + query) * value_dim;
#pragma unroll
      for (int j = 0; j < kLaneChannels; ++j) {
        if (lane + 32 * j < value_dim) out[j] += w * from[lane + 32 * j];
      }
    }
    finish = finish_query(params, sequence, head, token, top, sum);
  }
  if (lane == 0) params.lse[query] = finish.lse;
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    const int channel = lane + 32 * j;
    if (channel < value_dim) {
      static_cast<T*>(params.out)[query * value_dim + channel] =
          from_float<T>(finish_channel<T>(params, finish, channel, out[j]));
    }
  }
}

/// Parts that fill the device about twice, when the query tiles alone leave it empty and rows are long enough.
cudaError_t key_parts(const RaggedAttentionParams& params, int32_t* parts) {
  *parts = 1;
  const int64_t tiles = tiles_per_row(params) * params.rows.num_rows;
  if (params.dtype == DType::float32 || tiles == 0) return cudaSuccess;
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  if (tiles >= info.sm_count) return cudaSuccess;
  const int64_t keys = params.rows.capacity / params.rows.num_rows + params.tokens.seq_len;
  const int64_t wanted = std::min(ceil_div<int64_t>(2 * info.sm_count, tiles), ceil_div(keys, kKeysPerPart));
  *parts = static_cast<int32_t>(clamp<int64_t>(wanted, 1, kMaxKeyParts));
  return cudaSuccess;
}

/// Bytes of the workspace, and its parts when `memory` is given.
int64_t cut_workspace(const RaggedAttentionParams& params, int32_t parts, void* memory, RaggedWorkspace* work) {
  *work = {nullptr, nullptr, parts};
  if (parts == 1) return 0;
  const int64_t states = parts * query_count(params);
  if (memory != nullptr) {
    work->state = static_cast<float2*>(memory);
    work->out = reinterpret_cast<float*>(work->state + round_up<int64_t>(states, 2));
  }
  return round_up<int64_t>(states, 2) * static_cast<int64_t>(sizeof(float2)) +
         states * params.value_dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch(const RaggedAttentionParams& params, const RaggedWorkspace& work, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::float32:
      return launch_ragged_fp32(params, work, stream);
    case DType::float16:
      return launch_ragged_fp16(params, work, stream);
    case DType::bfloat16:
      return launch_ragged_bf16(params, work, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_warpgroups(const RaggedAttentionParams& params, WarpgroupPlan plan, void* workspace,
                              cudaStream_t stream) {
  RaggedMaps maps;
  if (const cudaError_t err = encode_maps(params, plan, &maps); err != cudaSuccess) return err;
  cut_warpgroup_workspace(params, workspace, &plan);
  const auto launch = params.dtype == DType::float16 ? launch_warpgroups_fp16 : launch_warpgroups_bf16;
  if (const cudaError_t err = launch(params, plan, maps, stream); err != cudaSuccess) return err;
  return launch_join_shares(params, plan, stream);
}

}  // namespace

cudaError_t ragged_attention_workspace_bytes(const RaggedAttentionParams& params, int64_t* bytes) {
  WarpgroupPlan plan;
  bool suits = false;
  if (const cudaError_t err = plan_warpgroups(params, &plan, &suits); err != cudaSuccess) return err;
  if (suits) {
    *bytes = cut_warpgroup_workspace(params, nullptr, &plan);
    return cudaSuccess;
  }
  int32_t parts = 1;
  if (const cudaError_t err = key_parts(params, &parts); err != cudaSuccess) return err;
  RaggedWorkspace unused;
  *bytes = cut_workspace(params, parts, nullptr, &unused);
  return cudaSuccess;
}

cudaError_t ragged_attention(const RaggedAttentionParams& params, void* workspace, cudaStream_t stream) {
  const int64_t queries = query_count(params);
  if (queries == 0) return cudaSuccess;
  WarpgroupPlan plan;
  bool suits = false;
  if (const cudaError_t err = plan_warpgroups(params, &plan, &suits); err != cudaSuccess) return err;
  if (suits) return launch_warpgroups(params, plan, workspace, stream);
  int32_t parts = 1;
  if (const cudaError_t err = key_parts(params, &parts); err != cudaSuccess) return err;
  RaggedWorkspace work;
  cut_workspace(params, parts, workspace, &work);
  if (const cudaError_t err = launch(params, work, stream); err != cudaSuccess || parts == 1) return err;
  const unsigned blocks = static_cast<unsigned>(ceil_div<int64_t>(queries, kJoinWarps));
  const auto kernel = params.dtype == DType::float16 ? join_kernel<__half> : join_kernel<__nv_bfloat16>;
  kernel<<<blocks, 32 * kJoinWarps, 0, stream>>>(params, work, queries);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
