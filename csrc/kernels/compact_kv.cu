// SPDX-License-Identifier: Apache-2.0
// A row is dealt out to several warps; each moves a handful of tokens at a time, keys and values together. Few rows get
// as many warps each as their tokens need, many rows equally many.
#include "kernels/compact_kv.h"

#include "core/math.h"
#include "kernels/common/dependent.cuh"
#include "kernels/common/errors.cuh"
#include "kernels/common/move_tokens.cuh"
#include "kernels/common/reduce.cuh"
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

/// Entries of the index that belong to a row.
struct RowEntries {
  int32_t begin, end;

  __device__ static RowEntries of(const CompactKvParams& p, int32_t row) {
    const int32_t begin = clamp<int32_t>(p.index_start[row], 0, p.total);
    return {begin, clamp<int32_t>(p.index_start[row + 1], begin, p.total)};
  }
};

/// Where a warp begins: at token `first` of a row. A row that does not exist: nothing to do.
struct WarpPlace {
  int32_t row;
  uint32_t first;
  RowEntries entries;
  int64_t start;
  int32_t room;
};

/// Up to 32 rows: warp number `item` does one pass, of the row whose passes it falls among; an empty row has one too.
/// Called by whole warps.
__device__ __forceinline__ WarpPlace place_of_pass(const CompactKvParams& p, WarpTokens tokens, uint32_t item,
                                                   int lane) {
  WarpPlace of{};
  uint32_t passes = 0;
  if (lane < p.rows.num_rows) {
    of = {lane, 0, RowEntries::of(p, lane), p.rows.start(lane), p.rows.room(lane)};
    passes = max_of(tokens.passes(of.entries.end - of.entries.begin), 1u);
  }
  uint32_t upto = passes;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, upto, offset);
    if (lane >= offset) upto += before;
  }
  const int32_t row = __popc(__ballot_sync(kFullWarp, upto <= item)), from = row % 32;
  return {row,
          (item - __shfl_sync(kFullWarp, upto - passes, from)) * tokens.per_pass(),
          {__shfl_sync(kFullWarp, of.entries.begin, from), __shfl_sync(kFullWarp, of.entries.end, from)},
          static_cast<int64_t>(__shfl_sync(kFullWarp, static_cast<long long>(of.start), from)),
          __shfl_sync(kFullWarp, of.room, from)};
}

/// `warps_of_row` is 0 where the passes of few rows are dealt out, one a warp.
template <class Lane, bool kFewRows>
__global__ void __launch_bounds__(32 * kWarps, 5)
    compact_kv_kernel(const __grid_constant__ CompactKvParams p, WarpTokens tokens, uint32_t warps_of_row,
                      int32_t* error) {
  wait_for_previous();
  let_next_start();
  const int lane = threadIdx.x % 32;
  const uint32_t item = blockIdx.x * kWarps + threadIdx.x / 32;
  WarpPlace place{};
  if constexpr (kFewRows) {
    place = place_of_pass(p, tokens, item, lane);
  } else {
    place.row = static_cast<int32_t>(item / warps_of_row);
    place.first = item % warps_of_row * tokens.per_pass();
  }
  const int32_t row = place.row;
  if (row >= p.rows.num_rows) return;
  if constexpr (!kFewRows) {
    place.entries = RowEntries::of(p, row);
    place.start = p.rows.start(row);
    place.room = p.rows.room(row);
  }

  const SourceRow source = source_row(p, row);
  const auto [begin, end] = place.entries;
  const int64_t start = place.start;
  const int32_t room = place.room, count = min_of(end - begin, room);
  if (place.first == 0 && lane == 0) {
    p.row_len[row] = count;
    if (end - begin > room) note_error(error, DeviceError::compact_kv_no_room);
  }

  TokenRun keys{p.key + source.key, p.key_stride.token, nullptr, p.key_bytes};
  TokenRun values{p.value + source.value, p.value_stride.token, nullptr, p.value_bytes};
  const int32_t* positions = p.position == nullptr ? nullptr : p.position + source.position;
  const int32_t side = tokens.side_by_side(), mine = tokens.token(lane, 0);
  const uint32_t stride = warps_of_row * tokens.per_pass();  // below 2^31 + 2^7, as all bases are
  for (uint32_t base = place.first; base < static_cast<uint32_t>(count); base += stride) {
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
    if constexpr (kFewRows) break;
  }
}

}  // namespace

cudaError_t compact_kv(const CompactKvParams& params, cudaStream_t stream) {
  const int32_t rows = params.rows.num_rows;
  if (rows == 0) return cudaSuccess;
  int32_t* error = nullptr;
  if (const cudaError_t err = error_word(&error); err != cudaSuccess) return err;
  const WarpTokens tokens = WarpTokens::of(max_of(params.key_bytes, params.value_bytes), params.lane_bytes);
  const auto launch = [&](auto kernel, int64_t warps, uint32_t warps_of_row) {
    bool early = false;
    const cudaError_t err = compiled_for_sm_90(reinterpret_cast<const void*>(kernel), &early);
    if (err != cudaSuccess) return err;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(warps, kWarps)));
    return launch_dependent(kernel, early, grid, 32 * kWarps, 0, stream, params, tokens, warps_of_row, error);
  };
  cudaError_t err = cudaSuccess;
  dispatch_lane(params.lane_bytes, [&](auto kind) {
    using Lane = decltype(kind);
    if (rows <= 32) {
      err = launch(compact_kv_kernel<Lane, true>, params.total / tokens.per_pass() + rows, 0);
      return;
    }
    // Enough warps that a row of mean length takes one pass; a longer row takes several. The product with the rows
    // stays below 2^32.
    const int64_t passes = max_of<int64_t>(ceil_div<int64_t>(params.total, int64_t{rows} * tokens.per_pass()), 1);
    err = launch(compact_kv_kernel<Lane, false>, rows * passes, static_cast<uint32_t>(passes));
  });
  return err;
}

}  // namespace uncomp::kernels
