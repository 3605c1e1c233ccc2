// SPDX-License-Identifier: Apache-2.0
// window_scores: runs, pass 1, the ordered merge of its partial sums, pass 2, and the norms of values.
#include "kernels/window_scores/window_scores.h"

#include <type_traits>

#include "core/dispatch.h"
#include "core/stream_plan.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/types.cuh"
#include "kernels/runtime.h"
#include "kernels/window_scores/passes.h"
#include "kernels/window_scores/tile.cuh"

namespace uncomp::kernels {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;

/// One warp a query: partial results of its row's runs, joined in an order that depends on their number alone.
__global__ void __launch_bounds__(kWindowThreads) merge_lse_kernel(const __grid_constant__ LsePass pass) {
  const WindowScoresParams& p = pass.params;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWindowWarps + threadIdx.x / 32;
  if (index >= static_cast<int64_t>(p.batch) * p.num_q_heads * p.window) return;
  const int lane = threadIdx.x % 32;
  const int32_t i = static_cast<int32_t>(index % p.window);
  const int32_t head = static_cast<int32_t>(index / p.window % p.num_q_heads);
  const int32_t sequence = static_cast<int32_t>(index / p.window / p.num_q_heads);
  const int32_t row = sequence * p.rows.rows_per_sequence + head / p.group_size;
  const int32_t all = p.group_size * p.window, n = p.rows.count(row);
  const bool exists = newest_visible(n, p.window, i) >= 0;
  const int32_t splits = exists ? ceil_div(n, pass.runs.run) : 0;
  const float2* partial = pass.partial + pass.runs.first_item(row) * all + head % p.group_size * p.window + i;
  LogSum joint{-kInf, 0.0f};
  for (int32_t s = lane; s < splits; s += 32) {
    const float2 of_run = partial[static_cast<int64_t>(s) * all];
    joint.join({of_run.x, of_run.y});
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const LogSum other{__shfl_down_sync(kFullWarp, joint.max, offset),
                       __shfl_down_sync(kFullWarp, joint.total, offset)};
    joint.join(other);
  }
  if (lane == 0) p.lse[index] = exists ? (joint.max + log2f(joint.total)) * kLn2 : -kInf;
}

/// Multiplies each score by the L2 norm of the token's value: one warp a token.
template <class T>
__global__ void __launch_bounds__(kWindowThreads) value_norm_kernel(const __grid_constant__ ScorePass pass) {
  const WindowScoresParams& p = pass.params;
  const int32_t runs = ceil_div(p.width, pass.run), row = blockIdx.x / runs, begin = blockIdx.x % runs * pass.run;
  const int32_t end = min_of(min_of(begin + pass.run, p.width), p.rows.count(row));
  const int32_t heads = p.reduce_group == Reduce::none ? p.group_size : 1;
  float* scores = p.scores + static_cast<int64_t>(row) * heads * p.width;
  const T* values = static_cast<const T*>(p.value) + p.rows.offset(row, p.value_stride);
  const int lane = threadIdx.x % 32;
  for (int32_t j = begin + threadIdx.x / 32; j < end; j += kWindowWarps) {
    const T* token = values + j * p.value_stride.token;
    float squares = 0.0f;
    for (int32_t d = lane * Vec16<T>::kCount; d < p.value_dim; d += 32 * Vec16<T>::kCount) {
      const Vec16<T> piece = load16_once(token + d);
#pragma unroll
      for (int e = 0; e < Vec16<T>::kCount; ++e) {
        const float x = to_float(piece.data[e]);
        squares = fmaf(x, x, squares);
      }
    }
    const float norm = sqrtf(warp_sum(squares));
    if (lane < heads) scores[static_cast<int64_t>(lane) * p.width + j] *= norm;
  }
}

/// Pass 1, the merge of its partial results, pass 2.
template <class T>
cudaError_t launch_passes(const LsePass& lse, const ScorePass& score, int64_t items, int64_t columns, int64_t queries,
                          cudaStream_t stream) {
  if (items > 0) {
    if (const cudaError_t err = launch_lse_pass<T>(lse, items, stream); err != cudaSuccess) return err;
  }
  if (queries > 0) {
    const int64_t blocks = ceil_div<int64_t>(queries, kWindowWarps);
    merge_lse_kernel<<<static_cast<unsigned>(blocks), kWindowThreads, 0, stream>>>(lse);
    if (const cudaError_t err = cudaGetLastError(); err != cudaSuccess) return err;
  }
  return columns == 0 ? cudaSuccess : launch_score_pass<T>(score, columns, stream);
}

/// Calls f with the launches of the dtype.
template <class F>
cudaError_t with_dtype(DType dtype, F&& f) {
  cudaError_t err = cudaErrorInvalidValue;
  dispatch_dtype(dtype, [&](auto tag) { err = f(tag); });
  return err;
}

struct Plan {
  bool streams;  // the kernels of sm_90a
  RowRuns runs;
  int32_t score_run;  // columns, where pass 2 is cut by columns
};

cudaError_t plan_of(const WindowScoresParams& params, Plan* plan) {
  DeviceInfo device{};
  if (const cudaError_t err = device_info(&device); err != cudaSuccess) return err;
  const int32_t tile = head_dim_tile(params.head_dim);
  if (tile == 0) return cudaErrorInvalidValue;
  plan->streams = false;
  if (device.capability == 90 && params.dtype != DType::float32) {
    const cudaError_t err = params.dtype == DType::float16
                                ? streams_built<__half>(params.head_dim, &plan->streams)
                                : streams_built<__nv_bfloat16>(params.head_dim, &plan->streams);
    if (err != cudaSuccess) return err;
  }
  const int64_t tokens = params.rows.in_arena() ? params.rows.arena.capacity
                                                : static_cast<int64_t>(params.num_rows) * params.rows.dense.seq_len;
  const int32_t run = plan->streams
                          ? stream_run_tokens(params.rows, params.num_rows, stream_keys(tile), device.sm_count)
                          : run_tokens(tokens, tile, 4 * device.sm_count);
  plan->runs = {params.rows, params.num_rows, run};
  plan->score_run = run_tokens(static_cast<int64_t>(params.num_rows) * params.width, tile, 4 * device.sm_count);
  return cudaSuccess;
}

}  // namespace

cudaError_t window_scores_workspace_bytes(const WindowScoresParams& params, size_t* bytes) {
  Plan plan{};
  if (const cudaError_t err = plan_of(params, &plan); err != cudaSuccess) return err;
  *bytes = static_cast<size_t>(plan.runs.items()) * params.group_size * params.window * sizeof(float2);
  return cudaSuccess;
}

cudaError_t window_scores(const WindowScoresParams& params, void* workspace, cudaStream_t stream) {
  Plan plan{};
  if (const cudaError_t err = plan_of(params, &plan); err != cudaSuccess) return err;
  StreamPlan stream_plan =
      StreamPlan::of(params.group_size, params.window, stream_groups(head_dim_tile(params.head_dim)));
  if (!params.rows.in_arena()) stream_plan.runs = ceil_div(params.rows.dense.seq_len, plan.runs.run);
  const LsePass lse{params, plan.runs, static_cast<float2*>(workspace), stream_plan};
  const ScorePass score{params, plan.score_run, plan.runs, lse.partial, stream_plan};
  const int64_t items = plan.runs.items();
  const int64_t columns = static_cast<int64_t>(params.num_rows) * ceil_div(params.width, plan.score_run);
  const int64_t queries = static_cast<int64_t>(params.batch) * params.num_q_heads * params.window;
  if (items > kMaxBlocks || columns > kMaxBlocks || ceil_div<int64_t>(queries, kWindowWarps) > kMaxBlocks) {
    return cudaErrorInvalidConfiguration;
  }
  return with_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool scored = false;
    if constexpr (!std::is_same_v<T, float>) {
      if (plan.streams && items > 0) {
        if (const cudaError_t err = launch_streams<T>(lse, score, items, stream); err != cudaSuccess) return err;
        scored = true;
      }
    }
    if (!scored) {
      if (const cudaError_t err = launch_passes<T>(lse, score, items, columns, queries, stream); err != cudaSuccess) {
        return err;
      }
    }
    if (params.value == nullptr || columns == 0) return cudaSuccess;
    value_norm_kernel<T><<<static_cast<unsigned>(columns), kWindowThreads, 0, stream>>>(score);
    return cudaGetLastError();
  });
}

}  // namespace uncomp::kernels
