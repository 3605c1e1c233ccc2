// SPDX-License-Identifier: Apache-2.0
// A row is dealt out to several warps; each moves a handful of tokens at a time, keys and values together.
#include "kernels/compact_kv.h"

#include "core/math.h"
#include "kernels/common/errors.cuh"
#include "kernels/common/move_tokens.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kFlights = WarpTokens::kInFlight;

/// Where the tokens of a row lie: byte offsets of its token 0, offset of its position 0, number of tokens.
struct SourceRow {
  int64_t key, value, position;
  int32_t tokens;
};

__device__ __forceinline__ SourceRow source_row(const CompactKvParams& p, int32_t row) {
  if (p.source_start != nullptr) {
    const int64_t begin = clamp<int64_t>(p.source_start[row], 0, p.source_slots);
    const int64_t end = clamp<int64_t>(p.source_start[row + 1], begin, p.source_slots);
    return {begin * p.key_stride.token, begin * p.value_stride.token, begin, static_cast<int32_t>(end - begin)};
  }
  const int32_t sequence = p.sources.sequence(row), head = p.sources.kv_head(row);
  const ValidTokens valid{p.first, nullptr, p.seq_len};
  const int64_t begin = valid.begin(sequence);
  return {sequence * p.key_stride.batch + head * p.key_stride.head + begin * p.key_stride.token,
          sequence * p.value_stride.batch + head * p.value_stride.head + begin * p.value_stride.token,
          static_cast<int64_t>(sequence) * p.seq_len + begin, valid.count(sequence)};
}

template <class Lane>
__global__ void __launch_bounds__(32 * kWarps, 5)
    compact_kv_kernel(const __grid_constant__ CompactKvParams p, WarpTokens tokens, uint32_t warps_of_row,
                      int32_t* error) {
  const int lane = threadIdx.x % 32;
  const uint32_t item = blockIdx.x * kWarps + threadIdx.x / 32;
  if (item >= static_cast<uint32_t>(p.rows.num_rows) * warps_of_row) return;
  const int32_t row = static_cast<int32_t>(item / warps_of_row);
  const uint32_t part = item % warps_of_row;

  const SourceRow source = source_row(p, row);
  const int32_t begin = clamp<int32_t>(p.index_start[row], 0, p.total);
  const int32_t end = clamp<int32_t>(p.index_start[row + 1], begin, p.total);
  const int64_t start = p.rows.start(row);
  const int32_t room = p.rows.room(row), count = min_of(end - begin, room);
  if (part == 0 && lane == 0) {
    p.row_len[row] = count;
    if (end - begin > room) note_error(error, DeviceError::compact_kv_no_room);
  }

  TokenRun keys{p.key + source.key, p.key_stride.token, nullptr, p.key_bytes};
  TokenRun values{p.value + source.value, p.value_stride.token, nullptr, p.value_bytes};
  const int32_t* positions = p.position == nullptr ? nullptr : p.position + source.position;
  const int32_t side = tokens.side_by_side(), mine = tokens.token(lane, 0);
  const int64_t stride = static_cast<int64_t>(warps_of_row) * tokens.per_pass();
  for (int64_t base = static_cast<int64_t>(part) * tokens.per_pass(); base < count; base += stride) {
    const int32_t left = count - static_cast<int32_t>(base);
    const int32_t* index = p.index + begin + base + mine;
    TakenTokens taken;
#pragma unroll
    for (int u = 0; u < kFlights; ++u) taken.source[u] = mine + u * side < left ? index[u * side] : 0;
    bool outside = false;
    int32_t position[kFlights];
#pragma unroll
    for (int u = 0; u < kFlights; ++u) {
      const bool live = mine + u * side < left, inside = taken.source[u] >= 0 && taken.source[u] < source.tokens;
      outside = outside || (live && !inside);
      taken.source[u] = !live ? TakenTokens::kNothing : inside ? taken.source[u] : TakenTokens::kZeros;
      position[u] = positions != nullptr && live && inside ? positions[taken.source[u]] : taken.source[u];
    }
    const int64_t slot = start + base + mine;
    keys.to = p.key_rows + slot * p.key_bytes;
    values.to = p.value_rows + slot * p.value_bytes;
    move_kv<Lane>(keys, values, taken, tokens, lane);
    if (tokens.place(lane) == 0) {
#pragma unroll
      for (int u = 0; u < kFlights; ++u) {
        if (mine + u * side < left) p.slot_position[slot + u * side] = position[u];
      }
      if (outside) note_error(error, DeviceError::compact_kv_index);
    }
  }
}

}  // namespace

cudaError_t compact_kv(const CompactKvParams& params, cudaStream_t stream) {
  const int32_t rows = params.rows.num_rows;
  if (rows == 0) return cudaSuccess;
  int32_t* error = nullptr;
  if (const cudaError_t err = error_word(&error); err != cudaSuccess) return err;
  const WarpTokens tokens = WarpTokens::of(max_of(params.key_bytes, params.value_bytes), params.lane_bytes);
  // Enough warps that a row of mean length takes one pass; a longer row takes several. The product with the rows
  // stays below 2^32.
  const int64_t passes = ceil_div<int64_t>(params.total, int64_t{rows} * tokens.per_pass());
  const uint32_t warps_of_row = static_cast<uint32_t>(max_of<int64_t>(passes, 1));
  const int64_t blocks = ceil_div<int64_t>(int64_t{rows} * warps_of_row, kWarps);
  dispatch_lane(params.lane_bytes, [&](auto kind) {
    compact_kv_kernel<decltype(kind)>
        <<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(params, tokens, warps_of_row, error);
  });
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
