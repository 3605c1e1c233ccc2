// SPDX-License-Identifier: Apache-2.0
// The same passes for fp32 on plain FMA: the twin without rounding that fp32 models and tests run. Written for
// correctness; a dot product is one thread's loop.
#include "core/votes.h"
#include "kernels/window_scores/passes.h"
#include "kernels/window_scores/score_pass.cuh"
#include "kernels/window_scores/tile.cuh"
#include "kernels/window_scores/vote_pass.cuh"

namespace uncomp::kernels {
namespace {

constexpr int kQueriesAtOnce = 64;

/// head_dim is a multiple of 8 and rows are 16-byte aligned.
__device__ __forceinline__ float dot(const float* a, const float* b, int32_t dim) {
  float sum = 0.0f;
  for (int32_t d = 0; d < dim; d += 4) {
    const Vec16<float> x = load16(a + d), y = load16(b + d);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum = fmaf(x.data[e], y.data[e], sum);
  }
  return sum;
}

/// A thread owns a query and walks the run's keys.
__global__ void __launch_bounds__(kQueriesAtOnce) lse_pass_fp32_kernel(const __grid_constant__ LsePass pass) {
  const WindowScoresParams& p = pass.params;
  const RowRun run = pass.runs.at(blockIdx.x);
  if (run.row < 0) return;
  const int32_t n = p.rows.count(run.row), all = p.group_size * p.window;
  const int32_t q = blockIdx.y * kQueriesAtOnce + threadIdx.x;
  if (run.first >= n || q >= all) return;
  const int32_t sequence = run.row / p.rows.rows_per_sequence, i = q % p.window;
  const int32_t head = (run.row % p.rows.rows_per_sequence) * p.group_size + q / p.window;
  const float* query = static_cast<const float*>(p.query) + sequence * p.query_stride.batch +
                       head * p.query_stride.head + i * p.query_stride.token;
  const float* row = static_cast<const float*>(p.key) + p.rows.offset(run.row, p.key_stride);
  const int32_t end = min_of(min_of(run.first + pass.runs.run, n), newest_visible(n, p.window, i) + 1);
  LogSum seen{-kInf, 0.0f};
  for (int32_t j = run.first; j < end; ++j) {
    const float logit = dot(query, row + j * p.key_stride.token, p.head_dim) * (p.scale * kLog2e);
    const float largest = fmaxf(seen.max, logit), zero = largest == -kInf ? 0.0f : largest;
    seen = {largest, seen.total * exp2_fast(seen.max - zero) + exp2_fast(logit - zero)};
  }
  pass.partial[static_cast<int64_t>(blockIdx.x) * all + q] = make_float2(seen.max, seen.total);
}

/// A thread owns a key and walks the queries of its row's heads.
__global__ void __launch_bounds__(kWindowThreads) score_pass_fp32_kernel(const __grid_constant__ ScorePass pass) {
  const WindowScoresParams& p = pass.params;
  const int32_t runs = ceil_div(p.width, pass.run), row_index = blockIdx.x / runs;
  const int32_t begin = blockIdx.x % runs * pass.run, stop = min_of(begin + pass.run, p.width);
  const int32_t n = p.rows.count(row_index);
  const int32_t sequence = row_index / p.rows.rows_per_sequence;
  const int32_t head0 = (row_index % p.rows.rows_per_sequence) * p.group_size;
  const bool per_head = p.reduce_group == Reduce::none;
  float* scores = p.scores + static_cast<int64_t>(row_index) * (per_head ? p.group_size : 1) * p.width;
  const float* query = static_cast<const float*>(p.query) + sequence * p.query_stride.batch;
  const float* lse = p.lse + (static_cast<int64_t>(sequence) * p.num_q_heads + head0) * p.window;
  const float* row = static_cast<const float*>(p.key) + p.rows.offset(row_index, p.key_stride);
  float share = p.reduce_group == Reduce::mean ? 1.0f / static_cast<float>(p.group_size) : 1.0f;
  if (p.reduce_window == Reduce::mean) share /= static_cast<float>(max_of(min_of(p.window, n), 1));
  for (int32_t j = begin + threadIdx.x; j < stop; j += kWindowThreads) {
    float total = 0.0f;
    for (int32_t h = 0; h < p.group_size; ++h) {
      float mass = 0.0f;
      for (int32_t i = 0; i < p.window && j < n; ++i) {
        if (j > newest_visible(n, p.window, i)) continue;
        const float* of_query = query + (head0 + h) * p.query_stride.head + i * p.query_stride.token;
        const float logit = dot(of_query, row + j * p.key_stride.token, p.head_dim) * (p.scale * kLog2e);
        mass += exp2_fast(logit - lse[h * p.window + i] * kLog2e);
      }
      if (per_head) scores[static_cast<int64_t>(h) * p.width + j] = mass * share;
      total = h == 0 ? mass : join_chunks(p.reduce_group, total, mass);
    }
    if (!per_head) scores[j] = total * share;
  }
}

/// A thread owns a slot.
__global__ void __launch_bounds__(kWindowThreads) vote_pass_fp32_kernel(const __grid_constant__ VotePass pass) {
  const SeedVotesParams& p = pass.params;
  const RowRun run = pass.runs.at(blockIdx.x);
  if (run.row < 0) return;
  write_fixed_state(p, run, pass.runs.run);
  const int32_t end = min_of(run.first + pass.runs.run, p.rows.count(run.row));
  const int32_t sequence = run.row / p.rows.rows_per_sequence, oldest = p.window - p.vote_window;
  const int32_t head0 = (run.row % p.rows.rows_per_sequence) * p.group_size, bits = vote_scale_bits(p.vote_window);
  const float* query = static_cast<const float*>(p.query) + sequence * p.query_stride.batch;
  const float* lse = p.lse + (static_cast<int64_t>(sequence) * p.num_q_heads + head0) * p.window;
  const int32_t* query_position = p.query_position + static_cast<int64_t>(sequence) * p.window;
  const int64_t start = p.rows.arena.start(run.row);
  const float share = p.reduce_group == Reduce::max ? 1.0f : static_cast<float>(p.group_size);
  for (int32_t j = run.first + threadIdx.x; j < end; j += kWindowThreads) {
    const int64_t slot = start + j;
    const float* key = static_cast<const float*>(p.key) + slot * p.key_stride;
    int32_t sum = 0;
    for (int32_t v = 0; v < p.vote_window; ++v) {
      const int32_t i = oldest + v;
      float weight = 0.0f;
      if (query_position[i] >= 0 && p.slot_position[slot] <= query_position[i]) {
        for (int32_t h = 0; h < p.group_size; ++h) {
          const float* of_query = query + (head0 + h) * p.query_stride.head + i * p.query_stride.token;
          const float logit = dot(of_query, key, p.head_dim) * (p.scale * kLog2e);
          weight = join_chunks(p.reduce_group, weight, exp2_fast(logit - lse[h * p.window + i] * kLog2e));
        }
      }
      const int32_t vote = quantize_vote(weight / share, bits);
      p.votes[v * p.rows.arena.capacity + slot] = vote;
      sum += vote;
    }
    p.vote_sum[slot] = sum;
  }
}

}  // namespace

template <>
cudaError_t launch_lse_pass<float>(const LsePass& pass, int64_t items, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(items), ceil_div(pass.params.group_size * pass.params.window, kQueriesAtOnce));
  lse_pass_fp32_kernel<<<grid, kQueriesAtOnce, 0, stream>>>(pass);
  return cudaGetLastError();
}

template <>
cudaError_t launch_score_pass<float>(const ScorePass& pass, int64_t items, cudaStream_t stream) {
  score_pass_fp32_kernel<<<static_cast<unsigned>(items), kWindowThreads, 0, stream>>>(pass);
  return cudaGetLastError();
}

template <>
cudaError_t launch_vote_pass<float>(const VotePass& pass, int64_t items, cudaStream_t stream) {
  vote_pass_fp32_kernel<<<static_cast<unsigned>(items), kWindowThreads, 0, stream>>>(pass);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
