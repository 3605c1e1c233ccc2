// SPDX-License-Identifier: Apache-2.0
// Joins the parts of the query tiles that several workers did, in the order of
// their keys.
#include "kernels/common/reduce.cuh"
#include "kernels/ragged_attention/finish.cuh"
#include "kernels/ragged_attention/shares.cuh"

namespace uncomp::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;        // of a packed query
constexpr int kLaneChannels = 8;  // neighbouring ones
constexpr int kQueries = kThreads / kLanes;

struct Joined {
  float top = -INFINITY, sum = 0.0f;
  float out[kLaneChannels] = {};
};

/// Adds `kCount` parts from `first` on, those below `parts`, to what is joined:
/// all reads before the first use. `offset(part)`: place of the query among the
/// queries of the part.
template <int kCount, class F>
__device__ __forceinline__ void join_parts(Joined& joined, const WarpgroupPlan& plan, int32_t first, int32_t parts,
                                           int32_t value_dim, int32_t channel, F offset) {
  float2 state[kCount];
  float4 x[kCount][2];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const bool here = first + k < parts;
    const int64_t at = offset(first + k);
    const float4* from = reinterpret_cast<const float4*>(plan.out + at * value_dim + channel);
    state[k] = here ? plan.state[at] : make_float2(-INFINITY, 0.0f);
    x[k][0] = x[k][1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (here && channel < value_dim) {
      x[k][0] = from[0];
      x[k][1] = from[1];
    }
  }
  float best = joined.top;
#pragma unroll
  for (int k = 0; k < kCount; ++k) best = fmaxf(best, state[k].x);
  const float base = finite_or_zero(best), shrink = exp2f(joined.top - base);
  joined.top = best;
  joined.sum *= shrink;
#pragma unroll
  for (float& y : joined.out) y *= shrink;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float weight = exp2f(state[k].x - base);
    joined.sum += weight * state[k].y;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      joined.out[4 * j] += weight * x[k][j].x;
      joined.out[4 * j + 1] += weight * x[k][j].y;
      joined.out[4 * j + 2] += weight * x[k][j].z;
      joined.out[4 * j + 3] += weight * x[k][j].w;
    }
  }
}

/// Blocks with blockIdx.x = w join the tile that worker w left unfinished, 16
/// packed queries and 128 channels each. Little work behind several reads that
/// wait for each other, so what can be read early is.
template <class T>
__global__ void __launch_bounds__(kThreads) join_shares_kernel(const __grid_constant__ RaggedAttentionParams params,
                                                               const __grid_constant__ WarpgroupPlan plan) {
  const int32_t worker = static_cast<int32_t>(blockIdx.x), queries = plan.queries();
  const int32_t lane = threadIdx.x % 32, value_dim = params.value_dim;
  const int32_t tile = plan.ends[worker].left;
  // Workers behind this one that have a part of the tile.
  const auto entered = [&](int32_t next) { return next < plan.workers ? plan.ends[next].entered : -1; };
  int32_t behind = entered(worker + 1 + lane);
  if (tile < 0) return;
  int32_t parts = 1;
  for (int32_t first = worker + 1;; behind = entered(first + lane)) {
    const unsigned others = ~__ballot_sync(kFullWarp, behind == tile);
    parts += others == 0 ? 32 : __ffs(static_cast<int>(others)) - 1;
    if (others != 0) break;
    first += 32;
  }

  const int32_t local = static_cast<int32_t>(blockIdx.y) * kQueries + static_cast<int32_t>(threadIdx.x) / kLanes;
  const int32_t row_index = plan.by_tiles_of_row.divide(tile);
  const int32_t m = (tile - row_index * plan.tiles_of_row) * queries + local;
  const int32_t token = plan.by_group_size.divide(m), head = m - token * params.group_size;
  if (token >= params.tokens.seq_len) return;
  const QueryRow row = query_row(params, row_index);
  const int32_t channel = (static_cast<int32_t>(blockIdx.z) * kLanes + lane % kLanes) * kLaneChannels;
  // Part 0 is the end of this worker's share; the others begin the shares of
  // the next workers.
  const auto offset = [&](int32_t part) {
    return (int64_t{2} * (worker + part) + (part == 0 ? 1 : 0)) * queries + local;
  };
  Joined joined;
  if (parts == 2) {
    join_parts<2>(joined, plan, 0, parts, value_dim, channel, offset);
  } else {
    for (int32_t first = 0; first < parts; first += 4) {
      join_parts<4>(joined, plan, first, parts, value_dim, channel, offset);
    }
  }
  // Of a query that is not valid the parts are not written: anything was read,
  // and nothing of it is used.
  QueryFinish finish{0.0f, 0.0f, -INFINITY, 0};
  if (row.valid(token)) {
    finish = finish_query(params, row.sequence, row.first_head + head, token, joined.top, joined.sum);
  }
  const int64_t query = result_index(params, row, head, token);
  if (channel == 0) params.lse[query] = finish.lse;
  if (channel >= value_dim) return;
  uint32_t packed[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    packed[j] = pack2<T>(finish_channel<T>(params, finish, channel + 2 * j, joined.out[2 * j]),
                         finish_channel<T>(params, finish, channel + 2 * j + 1, joined.out[2 * j + 1]));
  }
  *reinterpret_cast<uint4*>(static_cast<T*>(params.out) + query * value_dim + channel) =
      make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

}  // namespace

cudaError_t launch_join_shares(const RaggedAttentionParams& params, const WarpgroupPlan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.workers), static_cast<unsigned>(plan.queries() / kQueries),
                  static_cast<unsigned>(ceil_div(params.value_dim, kLanes * kLaneChannels)));
  const auto kernel = params.dtype == DType::float16 ? join_shares_kernel<__half> : join_shares_kernel<__nv_bfloat16>;
  kernel<<<grid, kThreads, 0, stream>>>(params, plan);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
