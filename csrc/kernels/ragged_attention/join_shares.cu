// SPDX-License-Identifier: Apache-2.0
// Joins the parts of the query tiles that several workers did, in the order of their keys.
#include "kernels/common/reduce.cuh"
#include "kernels/ragged_attention/finish.cuh"
#include "kernels/ragged_attention/shares.cuh"

namespace uncomp::kernels {
namespace {

constexpr int kWarps = 8;
constexpr int kPartsAtOnce = 6;
constexpr int kWarpChannels = 128;

/// Warps with blockIdx.x = w join the tile that worker w left unfinished: a packed query and 128 channels each, a lane
/// four neighbouring ones. Little work behind several reads that wait for each other, so what can be read early is.
template <class T>
__global__ void __launch_bounds__(32 * kWarps, 4)
    join_shares_kernel(const __grid_constant__ RaggedAttentionParams params,
                       const __grid_constant__ WarpgroupPlan plan) {
  const int32_t worker = static_cast<int32_t>(blockIdx.x), lane = threadIdx.x % 32, queries = plan.queries();
  const int32_t local = static_cast<int32_t>(blockIdx.y) * kWarps + static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t tile = plan.ends[worker].left;
  // Workers behind this one that have a part of the tile.
  const auto entered = [&](int32_t next) { return next < plan.workers ? plan.ends[next].entered : -1; };
  int32_t behind = entered(worker + 1 + lane);
  if (tile < 0) return;
  const int32_t row_index = plan.by_tiles_of_row.divide(tile);
  const int32_t m = (tile - row_index * plan.tiles_of_row) * queries + local;
  const int32_t token = plan.by_group_size.divide(m), head = m - token * params.group_size;
  if (token >= params.tokens.seq_len) return;
  int32_t parts = 1;
  for (int32_t first = worker + 1;; first += 32, behind = entered(first + lane)) {
    const unsigned others = ~__ballot_sync(kFullWarp, behind == tile);
    parts += others == 0 ? 32 : __ffs(static_cast<int>(others)) - 1;
    if (others != 0) break;
  }

  const QueryRow row = query_row(params, row_index);
  const int32_t channel = static_cast<int32_t>(blockIdx.z) * kWarpChannels + 4 * lane, value_dim = params.value_dim;
  const bool live = channel < value_dim;
  float top = -INFINITY, sum = 0.0f;
  float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int32_t first = 0; first < parts; first += kPartsAtOnce) {
    float2 state[kPartsAtOnce];
    float4 x[kPartsAtOnce];
#pragma unroll
    for (int k = 0; k < kPartsAtOnce; ++k) {
      // Part 0 is the end of this worker's share; the others begin the shares of the next workers.
      const int32_t part = first + k;
      const int64_t at = (int64_t{2} * (worker + part) + (part == 0 ? 1 : 0)) * queries + local;
      state[k] = part < parts ? plan.state[at] : make_float2(-INFINITY, 0.0f);
      x[k] = part < parts && live ? *reinterpret_cast<const float4*>(plan.out + at * value_dim + channel)
                                  : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    float best = top;
#pragma unroll
    for (int k = 0; k < kPartsAtOnce; ++k) best = fmaxf(best, state[k].x);
    const float base = finite_or_zero(best), shrink = exp2f(top - base);
    top = best;
    sum *= shrink;
    out = make_float4(out.x * shrink, out.y * shrink, out.z * shrink, out.w * shrink);
#pragma unroll
    for (int k = 0; k < kPartsAtOnce; ++k) {
      const float weight = exp2f(state[k].x - base);
      sum += weight * state[k].y;
      out.x += weight * x[k].x;
      out.y += weight * x[k].y;
      out.z += weight * x[k].z;
      out.w += weight * x[k].w;
    }
  }
  // Of a query that is not valid the parts are not written: anything was read, and nothing of it is used.
  QueryFinish finish{0.0f, 0.0f, -INFINITY, 0};
  if (row.valid(token)) finish = finish_query(params, row.sequence, row.first_head + head, token, top, sum);
  const int64_t query = result_index(params, row, head, token);
  if (lane == 0 && blockIdx.z == 0) params.lse[query] = finish.lse;
  if (!live) return;
  const auto value = [&](int c, float y) { return finish_channel<T>(params, finish, channel + c, y); };
  *reinterpret_cast<uint2*>(static_cast<T*>(params.out) + query * value_dim + channel) =
      make_uint2(pack2<T>(value(0, out.x), value(1, out.y)), pack2<T>(value(2, out.z), value(3, out.w)));
}

}  // namespace

cudaError_t launch_join_shares(const RaggedAttentionParams& params, const WarpgroupPlan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.workers), static_cast<unsigned>(plan.queries() / kWarps),
                  static_cast<unsigned>(ceil_div(params.value_dim, kWarpChannels)));
  const auto kernel = params.dtype == DType::float16 ? join_shares_kernel<__half> : join_shares_kernel<__nv_bfloat16>;
  kernel<<<grid, 32 * kWarps, 0, stream>>>(params, plan);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
