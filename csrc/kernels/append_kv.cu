// SPDX-License-Identifier: Apache-2.0
// A warp writes a handful of tokens of one row. When one warp covers all new tokens of a row it advances row_len
// itself; otherwise every warp of the row reads the old length and a second kernel advances it.
#include "kernels/append_kv.h"

#include "core/math.h"
#include "kernels/common/errors.cuh"
#include "kernels/common/move_tokens.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kFlights = WarpTokens::kInFlight;
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

template <class Lane>
__global__ void __launch_bounds__(32 * kWarps, 5)
    append_kv_kernel(const __grid_constant__ AppendKvParams p, WarpTokens tokens, uint32_t warps_of_row,
                     int32_t* error) {
  const int lane = threadIdx.x % 32;
  const uint32_t item = blockIdx.x * kWarps + threadIdx.x / 32;
  if (item >= static_cast<uint32_t>(p.rows.num_rows) * warps_of_row) return;
  const int32_t row = static_cast<int32_t>(item / warps_of_row);
  const uint32_t part = item % warps_of_row;

  const RowPlan plan = plan_row(p, row);
  if (!plan.fits) {
    if (part == 0 && lane == 0) note_error(error, DeviceError::append_kv_no_room);
    return;
  }
  const int32_t sequence = p.sources.sequence(row), head = p.sources.kv_head(row);
  const int64_t base = static_cast<int64_t>(part) * tokens.per_pass();
  if (base >= plan.count) return;

  const int32_t left = plan.count - static_cast<int32_t>(base);
  const int32_t side = tokens.side_by_side(), mine = tokens.token(lane, 0);
  const int64_t slot = p.rows.start(row) + plan.length + base + mine;
  const TokenRun keys{p.key + sequence * p.key_stride.batch + head * p.key_stride.head, p.key_stride.token,
                      p.key_rows + slot * p.key_bytes, p.key_bytes};
  const TokenRun values{p.value + sequence * p.value_stride.batch + head * p.value_stride.head, p.value_stride.token,
                        p.value_rows + slot * p.value_bytes, p.value_bytes};
  const int32_t* positions = p.position + static_cast<int64_t>(sequence) * p.valid.seq_len;
  const int32_t first = p.valid.begin(sequence) + static_cast<int32_t>(base) + mine;
  int32_t position[kFlights];
  TakenTokens taken;
#pragma unroll
  for (int u = 0; u < kFlights; ++u) {
    const bool live = mine + u * side < left;
    taken.source[u] = live ? first + u * side : TakenTokens::kNothing;
    position[u] = live ? positions[taken.source[u]] : 0;
  }
  move_kv<Lane>(keys, values, taken, tokens, lane);
  if (tokens.place(lane) == 0) {
#pragma unroll
    for (int u = 0; u < kFlights; ++u) {
      if (mine + u * side < left) p.slot_position[slot + u * side] = position[u];
    }
  }
  if (warps_of_row == 1) {
    __syncwarp();  // every lane has read the old length
    if (lane == 0) p.row_len[row] = plan.length + plan.count;
  }
}

__global__ void __launch_bounds__(kAdvanceThreads) advance_rows_kernel(const __grid_constant__ AppendKvParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kAdvanceThreads + threadIdx.x;
  if (row >= p.rows.num_rows) return;
  const RowPlan plan = plan_row(p, static_cast<int32_t>(row));
  if (plan.fits && plan.count > 0) p.row_len[row] = plan.length + plan.count;
}

}  // namespace

cudaError_t append_kv(const AppendKvParams& params, cudaStream_t stream) {
  const int32_t rows = params.rows.num_rows;
  if (rows == 0 || params.valid.seq_len == 0) return cudaSuccess;
  int32_t* error = nullptr;
  if (const cudaError_t err = error_word(&error); err != cudaSuccess) return err;
  const WarpTokens tokens = WarpTokens::of(max_of(params.key_bytes, params.value_bytes), params.lane_bytes);
  const uint32_t warps_of_row = static_cast<uint32_t>(ceil_div<int64_t>(params.valid.seq_len, tokens.per_pass()));
  const int64_t blocks = ceil_div<int64_t>(int64_t{rows} * warps_of_row, kWarps);
  dispatch_lane(params.lane_bytes, [&](auto kind) {
    append_kv_kernel<decltype(kind)>
        <<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(params, tokens, warps_of_row, error);
  });
  if (const cudaError_t err = cudaGetLastError(); err != cudaSuccess || warps_of_row == 1) return err;
  advance_rows_kernel<<<static_cast<unsigned>(ceil_div<int64_t>(rows, kAdvanceThreads)), kAdvanceThreads, 0, stream>>>(
      params);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
