// SPDX-License-Identifier: Apache-2.0
// A warp writes a handful of tokens of one row. When one warp covers all new tokens of a row it advances row_len
// itself; otherwise a cluster of blocks appends to the row, or, without clusters, a second kernel advances row_len.
#include "kernels/append_kv.h"

#include "core/math.h"
#include "kernels/common/cluster.cuh"
#include "kernels/common/dependent.cuh"
#include "kernels/common/errors.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/common/move_tokens.cuh"
#include "kernels/common/slot_tokens.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kFlights = WarpTokens::kInFlight;
constexpr int kClusterWarps = 8;
constexpr uint32_t kClusterBlocks = 8;
constexpr int kAdvanceThreads = 128;

/// What happens to one row, decided alike by all of its warps and by the kernel that advances row_len.
struct RowPlan {
  int32_t length, count;  // tokens before, new tokens
  bool fits;
};

__device__ __forceinline__ RowPlan plan_row(const AppendKvParams& p, int32_t row) {
  const int32_t length = p.rows.len(row), count = p.valid.count(p.sources.sequence(row));
  return {length, count, count <= p.rows.room(row) - length};
}

/// Passes of a warp over the new tokens of a row, `stride` tokens apart. The tokens are on their way before the row's
/// length is known. The plan is right where this warp had a pass or `report` was set.
template <class Lane>
__device__ __forceinline__ RowPlan append_tokens(const AppendKvParams& p, const WarpTokens& tokens, int32_t row,
                                                 int64_t base, int64_t stride, int lane, int32_t* error, bool report) {
  const int32_t sequence = p.sources.sequence(row), head = p.sources.kv_head(row);
  const int32_t first = p.valid.begin(sequence), count = p.valid.count(sequence);
  const int32_t side = tokens.side_by_side(), mine = tokens.token(lane, 0);
  const char* key = p.key + sequence * p.key_stride.batch + head * p.key_stride.head;
  const char* value = p.value + sequence * p.value_stride.batch + head * p.value_stride.head;
  const int32_t* positions = p.position + static_cast<int64_t>(sequence) * p.valid.seq_len;
  SlotRun keys{{}, p.key_rows, p.key_bytes}, values{{}, p.value_rows, p.value_bytes};
  const int32_t pieces = max_of(p.key_bytes, p.value_bytes) / static_cast<int32_t>(sizeof(Lane));
  RowPlan plan{0, 0, false};
  for (bool once = report; once || base < count; once = false, base += stride) {
    SlotTokens taken;
    int32_t position[kFlights];
#pragma unroll
    for (int u = 0; u < kFlights; ++u) {
      const int64_t ahead = base + mine + u * side;
      const bool live = ahead < count;
      const int32_t token = first + static_cast<int32_t>(ahead);
      taken.source[u] = live ? token : SlotTokens::kNothing;
      keys.from[u] = key + token * p.key_stride.token;
      values.from[u] = value + token * p.value_stride.token;
      position[u] = live ? positions[token] : 0;
    }
    MovingTokens<Lane> moving;
    int32_t at = tokens.place(lane);
    moving.load(keys, values, taken, at);
    plan = plan_row(p, row);
    if (!plan.fits) {
      if (report && lane == 0) note_error(error, DeviceError::append_kv_no_room);
      return plan;
    }
    const int32_t slot = static_cast<int32_t>(p.rows.start(row)) + plan.length + static_cast<int32_t>(base) + mine;
#pragma unroll
    for (int u = 0; u < kFlights; ++u) taken.slot[u] = slot + u * side;
    moving.store(keys, values, taken, at);
    for (at += tokens.lanes(); at < pieces; at += tokens.lanes()) {
      moving.load(keys, values, taken, at);
      moving.store(keys, values, taken, at);
    }
    if (tokens.place(lane) == 0) {
#pragma unroll
      for (int u = 0; u < kFlights; ++u) {
        if (taken.source[u] != SlotTokens::kNothing) p.slot_position[taken.slot[u]] = position[u];
      }
    }
  }
  return plan;
}

template <class Lane>
__global__ void __launch_bounds__(32 * kWarps, 5)
    append_kv_kernel(const __grid_constant__ AppendKvParams p, WarpTokens tokens, uint32_t warps_of_row,
                     int32_t* error) {
  let_next_start();
  const int lane = threadIdx.x % 32;
  const uint32_t item = blockIdx.x * kWarps + threadIdx.x / 32;
  if (item >= static_cast<uint32_t>(p.rows.num_rows) * warps_of_row) return;
  const int32_t row = static_cast<int32_t>(item / warps_of_row);
  const uint32_t part = item % warps_of_row;
  const RowPlan plan = append_tokens<Lane>(p, tokens, row, static_cast<int64_t>(part) * tokens.per_pass(),
                                           int64_t{1} << 32, lane, error, part == 0);
  if (warps_of_row == 1) {
    __syncwarp();  // every lane has read the old length
    if (lane == 0 && plan.fits && plan.count > 0) p.row_len[row] = plan.length + plan.count;
  }
}

/// A cluster of blocks appends to one row: its barrier stands between the last read of the length and its advance.
template <class Lane>
__global__ void __launch_bounds__(32 * kClusterWarps)
    append_kv_cluster_kernel(const __grid_constant__ AppendKvParams p, WarpTokens tokens, uint32_t blocks,
                             int32_t* error) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t row = static_cast<int32_t>(blockIdx.x / blocks), rank = static_cast<int32_t>(blockIdx.x % blocks);
  const int32_t part = rank * kClusterWarps + warp, parts = static_cast<int32_t>(blocks) * kClusterWarps;
  const RowPlan plan = append_tokens<Lane>(p, tokens, row, int64_t{part} * tokens.per_pass(),
                                           int64_t{parts} * tokens.per_pass(), lane, error, part == 0);
  cluster_arrive();
  if (part != 0) return;
  cluster_wait();
  if (lane == 0 && plan.fits && plan.count > 0) p.row_len[row] = plan.length + plan.count;
}

__global__ void __launch_bounds__(kAdvanceThreads) advance_rows_kernel(const __grid_constant__ AppendKvParams p) {
  wait_for_previous();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kAdvanceThreads + threadIdx.x;
  if (row >= p.rows.num_rows) return;
  const RowPlan plan = plan_row(p, static_cast<int32_t>(row));
  if (plan.fits && plan.count > 0) p.row_len[row] = plan.length + plan.count;
}

/// Rows of several passes, one cluster each; `done` is false where the device has no clusters or they would not pay.
template <class Lane>
cudaError_t append_by_clusters(const AppendKvParams& params, const WarpTokens& tokens, int32_t* error,
                               cudaStream_t stream, bool* done) {
  const int64_t passes = ceil_div<int64_t>(params.valid.seq_len, tokens.per_pass());
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  uint32_t blocks = kClusterBlocks;
  while (blocks > 1 && int64_t{blocks / 2} * kClusterWarps >= passes) blocks /= 2;
  *done = false;
  const int64_t at_once = int64_t{blocks} * kClusterWarps * params.rows.num_rows;
  if (passes > 2 * int64_t{blocks} * kClusterWarps && at_once < 16 * info.sm_count) return cudaSuccess;
  const void* kernel = reinterpret_cast<const void*>(&append_kv_cluster_kernel<Lane>);
  if (const cudaError_t err = cluster_fits(kernel, static_cast<int32_t>(blocks), 32 * kClusterWarps, 0, done);
      err != cudaSuccess || !*done) {
    return err;
  }
  const dim3 grid(static_cast<unsigned>(params.rows.num_rows) * blocks);
  return launch_kernel({grid, 32 * kClusterWarps, 0, stream, static_cast<int>(blocks)}, append_kv_cluster_kernel<Lane>,
                       params, tokens, blocks, error);
}

/// Every warp of a row reads the old length; a second kernel, which starts early, advances it.
cudaError_t advance_rows(const AppendKvParams& params, cudaStream_t stream) {
  bool early = false;
  const void* kernel = reinterpret_cast<const void*>(advance_rows_kernel);
  if (const cudaError_t err = compiled_for_sm_90(kernel, &early); err != cudaSuccess) return err;
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(params.rows.num_rows, kAdvanceThreads)));
  return launch_dependent(advance_rows_kernel, early, grid, kAdvanceThreads, 0, stream, params);
}

}  // namespace

cudaError_t append_kv(const AppendKvParams& params, cudaStream_t stream) {
  const int32_t rows = params.rows.num_rows;
  if (rows == 0 || params.valid.seq_len == 0) return cudaSuccess;
  int32_t* error = nullptr;
  if (const cudaError_t err = error_word(&error); err != cudaSuccess) return err;
  const WarpTokens tokens = WarpTokens::of(max_of(params.key_bytes, params.value_bytes), params.lane_bytes);
  const uint32_t warps_of_row = static_cast<uint32_t>(ceil_div<int64_t>(params.valid.seq_len, tokens.per_pass()));
  bool done = false;
  cudaError_t err = cudaSuccess;
  dispatch_lane(params.lane_bytes, [&](auto kind) {
    using Lane = decltype(kind);
    if (warps_of_row > 1) err = append_by_clusters<Lane>(params, tokens, error, stream, &done);
    if (done || err != cudaSuccess) return;
    const int64_t blocks = ceil_div<int64_t>(int64_t{rows} * warps_of_row, kWarps);
    append_kv_kernel<Lane>
        <<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(params, tokens, warps_of_row, error);
    err = cudaGetLastError();
  });
  return err != cudaSuccess || done || warps_of_row == 1 ? err : advance_rows(params, stream);
}

}  // namespace uncomp::kernels
