// SPDX-License-Identifier: Apache-2.0
// The stream of key tiles of sm_90a: three warps copy, warpgroups multiply 64 packed queries each, held in registers or
// in shared memory, with the tile in shared memory. A team is the warpgroups that together have all queries of a chunk;
// teams take turns at tiles, so the fewer queries there are the more tiles are in work at once.
#pragma once

#include <cstdint>

#include "core/stream_plan.h"
#include "kernels/window_scores/hopper.cuh"
#include "kernels/window_scores/passes.h"
#include "kernels/window_scores/tile.cuh"

namespace uncomp::kernels {

template <class T, int kTile>
struct KeyStream {
  static constexpr int kGroups = stream_groups(kTile);
  static constexpr int kConsumers = 128 * kGroups;  // threads that multiply
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kCopyWarp = kConsumers / 32;
  static constexpr int kCopyWarps = 3;
  static constexpr int kFinishWarp = kCopyWarp + kCopyWarps;  // adds what the warpgroups of a team found; scores only
  /// Registers of a thread that multiplies, and of the others: within what the block starts with.
  static constexpr int kConsumerRegisters = kGroups == 3 ? 144 : 104, kHelperRegisters = 64;
  static_assert(kConsumers * kConsumerRegisters + 128 * kHelperRegisters <= 65536 / kThreads / 8 * 8 * kThreads);

  static constexpr int kKeys = stream_keys(kTile);  // of a tile
  static constexpr int kPanels = kTile / 64;        // of 64 channels: rows of 128 bytes
  static constexpr int kSteps = kTile / 16;
  static constexpr int kProducts = kKeys / 2;  // of a thread, 64 queries a warpgroup
  static constexpr int kTileBytes = kKeys * kTile * static_cast<int>(sizeof(T));
  static constexpr int kStages = kTileBytes > 16384 ? 4 : 10;
  // Tiles of 128 keys leave no registers for the queries.
  static constexpr bool kSharedQueries = kKeys == 128;
  static constexpr int kQueryBytes = 64 * kTile * static_cast<int>(sizeof(T));  // of a warpgroup
  static constexpr size_t kRing = size_t{kStages} * kTileBytes;
  static constexpr size_t kBytes = kRing + (kSharedQueries ? kGroups * kQueryBytes : 0);

  using Queries = uint32_t[kSteps][4];
};

/// What the blocks of both passes know of their work.
struct StreamBlock {
  int32_t row, first, end, tokens;  // keys first .. end - 1 of `tokens`
  int32_t item;                     // number of the run
  int32_t tiles;                    // of one chunk
  int32_t sequence, head0;
};

/// Row -1: nothing to do.
__device__ __forceinline__ StreamBlock stream_block(const WindowScoresParams& p, const RowRuns& runs,
                                                    const StreamPlan& plan, int32_t keys) {
  StreamBlock block{};
  if (plan.runs > 0) {
    // The heads of one stretch of tokens are read together: neighbours in memory.
    const int32_t stretch = static_cast<int32_t>(blockIdx.x) / runs.num_rows;
    block.row = static_cast<int32_t>(blockIdx.x) - stretch * runs.num_rows;
    block.first = stretch * runs.run;
    block.item = block.row * plan.runs + stretch;
  } else {
    const RowRun run = runs.at(blockIdx.x);
    block.row = run.row;
    block.first = run.first;
    block.item = static_cast<int32_t>(blockIdx.x);
    if (run.row < 0) return block;
  }
  block.tokens = p.rows.count(block.row);
  block.end = min_of(block.first + runs.run, block.tokens);
  block.tiles = ceil_div(max_of(block.end - block.first, 0), keys);
  block.sequence = block.row / p.rows.rows_per_sequence;
  block.head0 = (block.row - block.sequence * p.rows.rows_per_sequence) * p.group_size;
  return block;
}

/// The packed query of a row of a chunk; head -1: none.
struct PackedQuery {
  int32_t head, i;  // head inside the row's group
};

__device__ __forceinline__ PackedQuery packed_query(const StreamPlan& plan, int32_t group, int32_t window,
                                                    int32_t tokens, int32_t chunk, int32_t q) {
  const int32_t h = plan.head_of(q / kQueryTile), i = q - h * plan.heads.tiles_per_head * kQueryTile;
  const bool exists = h < plan.heads.heads_in(chunk, group) && i < window && newest_visible(tokens, window, i) >= 0;
  return {exists ? chunk * plan.heads.heads_per_chunk + h : -1, i};
}

#if UNCOMP_SM90A

/// Loads 64 packed queries of a chunk, from `q0` on, as first operand of the warpgroup. A negative factor of the logits
/// moves into the queries.
template <class T, int kTile>
__device__ __forceinline__ void load_queries(typename KeyStream<T, kTile>::Queries& a, const WindowScoresParams& p,
                                             const StreamPlan& plan, const StreamBlock& block, int32_t chunk,
                                             int32_t q0) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const PackedQuery packed =
        packed_query(plan, p.group_size, p.window, block.tokens, chunk, q0 + 16 * warp + 8 * h + lane / 4);
    const bool live = packed.head >= 0 && p.scale != 0.0f;
    const T* row = static_cast<const T*>(p.query) + block.sequence * p.query_stride.batch +
                   (block.head0 + max_of(packed.head, 0)) * p.query_stride.head + packed.i * p.query_stride.token;
#pragma unroll
    for (int k = 0; k < KeyStream<T, kTile>::kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = 16 * k + 8 * half + 2 * (lane % 4);
        uint32_t pair = 0;
        if (live && channel < p.head_dim) pair = *reinterpret_cast<const uint32_t*>(row + channel);
        a[k][2 * half + h] = pair;
      }
    }
  }
  if (p.scale >= 0.0f) return;
#pragma unroll
  for (int k = 0; k < KeyStream<T, kTile>::kSteps; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[k][r] ^= 0x80008000u;
  }
}

/// The same into shared memory, by the threads of one warpgroup, as `multiply` wants them: swizzled rows of 128 bytes.
template <class T, int kTile>
__device__ __forceinline__ void share_queries(unsigned char* to, const WindowScoresParams& p, const StreamPlan& plan,
                                              const StreamBlock& block, int32_t chunk, int32_t q0) {
  constexpr int kPieces = kTile / 8, kAtOnce = 128 / kPieces;
  const int thread = threadIdx.x % 128, piece = thread % kPieces;
  const auto place = [&](int q) { return to + piece / 8 * 64 * 128 + q * 128 + swizzled(q, piece % 8) * 16; };
  for (int q = thread / kPieces; q < 64; q += kAtOnce) {
    const PackedQuery packed = packed_query(plan, p.group_size, p.window, block.tokens, chunk, q0 + q);
    const bool live = packed.head >= 0 && p.scale != 0.0f && 8 * piece < p.head_dim;
    const T* row = static_cast<const T*>(p.query) + block.sequence * p.query_stride.batch +
                   (block.head0 + max_of(packed.head, 0)) * p.query_stride.head + packed.i * p.query_stride.token;
    cp_async16(place(q), live ? row + 8 * piece : row, live);
  }
  cp_async_wait_all();
  if (p.scale < 0.0f) {
    for (int q = thread / kPieces; q < 64; q += kAtOnce) {
      uint4& four = *reinterpret_cast<uint4*>(place(q));
      four = make_uint4(four.x ^ 0x80008000u, four.y ^ 0x80008000u, four.z ^ 0x80008000u, four.w ^ 0x80008000u);
    }
  }
  fence_async_shared();
}

/// Queries of a warpgroup for one chunk, in registers or, alike for all teams, in shared memory. Made by all threads
/// that multiply, when all have done with the chunk before; those in shared memory are there after the next barrier.
template <class T, int kTile, bool kShared = KeyStream<T, kTile>::kSharedQueries>
struct ChunkQueries {
  typename KeyStream<T, kTile>::Queries a;

  __device__ __forceinline__ ChunkQueries(unsigned char*, const WindowScoresParams& p, const StreamPlan& plan,
                                          const StreamBlock& block, int32_t chunk, int32_t team, int32_t part) {
    if (team < plan.teams) load_queries<T, kTile>(a, p, plan, block, chunk, 64 * part);
  }
};
template <class T, int kTile>
struct ChunkQueries<T, kTile, true> {
  const unsigned char* a;

  __device__ __forceinline__ ChunkQueries(unsigned char* shared, const WindowScoresParams& p, const StreamPlan& plan,
                                          const StreamBlock& block, int32_t chunk, int32_t team, int32_t part) {
    unsigned char* to = shared + part * KeyStream<T, kTile>::kQueryBytes;
    if (team == 0) share_queries<T, kTile>(to, p, plan, block, chunk, 64 * part);
    a = to;
  }
};

/// One copying warp's share of every tile of a block's run, chunk after chunk, each when its place is free. All warps
/// walk all tiles: a phase of a place is seen by each of them, so none can take an old one for the next. `backward`:
/// the last tile of the run comes first.
template <class T, int kTile>
__device__ __forceinline__ void copy_stream(unsigned char* ring, PhaseBarrier* full, PhaseBarrier* empty, const T* row,
                                            int64_t stride, const StreamBlock& block, int32_t head_dim, int32_t chunks,
                                            bool backward) {
  using Stream = KeyStream<T, kTile>;
  constexpr int kPieces = kTile / 8, kRowsAtOnce = 32 / kPieces, kSteps = 8 / kRowsAtOnce;
  const int lane = threadIdx.x % 32, piece = lane % kPieces;
  const bool channels = piece * 8 < head_dim;
  // The swizzle repeats after eight keys.
  uint32_t place[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int key = s * kRowsAtOnce + lane / kPieces;
    place[s] = piece / 8 * Stream::kKeys * 128 + key * 128 + swizzled(key, piece % 8) * 16;
  }
  const int64_t step = kRowsAtOnce * stride, skip = 8 * (Stream::kCopyWarps - 1) * stride;
  const int own = 8 * (threadIdx.x / 32 - Stream::kCopyWarp);
  int32_t slot = 0, phase = 1;
  for (int32_t it = 0; it < chunks * block.tiles; ++it) {
    const int32_t tile = it % block.tiles;
    const int32_t first = block.first + (backward ? block.tiles - 1 - tile : tile) * Stream::kKeys;
    const T* from = row + (first + own + lane / kPieces) * stride + piece * 8;
    unsigned char* to = ring + slot * Stream::kTileBytes + own * 128;
    const int32_t live = channels ? block.end - first : 0;
    empty[slot].wait(phase);
#pragma unroll 1
    for (int r = own; r < Stream::kKeys; r += 8 * Stream::kCopyWarps) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const bool exists = r + s * kRowsAtOnce + lane / kPieces < live;
        cp_async16(to + place[s], exists ? from : row, exists);
        from += step;
      }
      from += skip;
      to += 1024 * Stream::kCopyWarps;
    }
    full[slot].arrive_after_copies();
    if (++slot == Stream::kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
  cp_async_wait_all();
}

/// Hides the keys of the tile at `first` that a thread's two queries, q and q + 8 of the chunk, do not see. Only the
/// last W keys, and what lies behind the last one, need it.
template <int kProducts>
__device__ __forceinline__ void mask_tile(float (&c)[kProducts], const WindowScoresParams& p, const StreamPlan& plan,
                                          const StreamBlock& block, int32_t chunk, int32_t q, int32_t first) {
  if (first + 2 * kProducts - 1 <= newest_visible(block.tokens, p.window, 0)) return;
  const int32_t column = first + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const PackedQuery packed = packed_query(plan, p.group_size, p.window, block.tokens, chunk, q + 8 * h);
    const int32_t newest = packed.head < 0 ? -1 : newest_visible(block.tokens, p.window, packed.i);
#pragma unroll
    for (int j = 0; j < kProducts / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (column + 8 * j + e > newest) c[4 * j + 2 * h + e] = -kInf;
      }
    }
  }
}

/// Warpgroups of a team multiply in turns, so that one multiplies while others take exponentials: all at once, they
/// would share the tensor cores evenly and be done at the same time. The last one of the team lets the first one begin.
struct Turns {
  int mine, next;
  bool alone;

  __device__ __forceinline__ Turns(const StreamPlan& plan, int32_t group, int32_t part)
      : mine(2 + group), next(part + 1 == plan.team ? 2 + group - part : 3 + group), alone(plan.team == 1) {
    if (!alone && part + 1 == plan.team) pass_on();
  }
  __device__ __forceinline__ void wait() const {
    if (!alone) asm volatile("bar.sync %0, 256;\n" ::"r"(mine) : "memory");
  }
  __device__ __forceinline__ void pass_on() const {
    if (!alone) asm volatile("bar.arrive %0, 256;\n" ::"r"(next) : "memory");
  }
};

/// Products of the warpgroup's queries with one tile; `a` is the `a` of ChunkQueries.
template <class T, int kTile, class Queries>
__device__ __forceinline__ void multiply(float (&c)[KeyStream<T, kTile>::kProducts], const Queries& a,
                                         const unsigned char* tile, const Turns& turns) {
  using Stream = KeyStream<T, kTile>;
  const uint64_t operand = wgmma_operand(tile);
  fence_async_shared();
  turns.wait();
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Stream::kSteps; ++k) {
    const uint64_t b = operand + ((k / 4 * Stream::kKeys * 128 + k % 4 * 32) >> 4);
    if constexpr (Stream::kSharedQueries) {
      wgmma_start<T>(c, wgmma_operand(a) + ((k / 4 * 64 * 128 + k % 4 * 32) >> 4), b, k > 0);
    } else {
      wgmma_start<T>(c, a[k], b, k > 0);
    }
  }
  wgmma_commit();
  turns.pass_on();
  wgmma_wait<0>();
}

#endif

}  // namespace uncomp::kernels
