// SPDX-License-Identifier: Apache-2.0
// Shared memory of a block of the sm_90a path, and what its loading warps do. One warp streams key and value tiles into
// a ring of slots by tensor copies; the others fill the query buffers one tile ahead of the computing warpgroups.
//
// Every tile in shared memory is a row of panels: 64 channels wide, 128 bytes a row, 16-byte chunks XOR-swizzled.
#pragma once

#include "kernels/common/types.cuh"
#include "kernels/ragged_attention/arrivals.cuh"
#include "kernels/ragged_attention/shares.cuh"

namespace uncomp::kernels {

inline constexpr int kGroupThreads = 128;
inline constexpr int kPanelWidth = 64;
inline constexpr int kPanelRowBytes = 2 * kPanelWidth;

/// A query tile in a buffer: which part of it this block does.
struct TileWork {
  QueryTile tile;
  TilePart part;
  bool last;

  __device__ __forceinline__ int32_t key_tiles() const { return tile.keys.tiles == 0 ? 0 : part.end - part.begin; }
};

struct BlockControl {
  uint64_t full[kMostSlots], empty[kMostSlots];  // tile is here; all computing warps are done with it
  uint64_t query_full[2], query_empty[2];        // queries are here; all computing threads are done with their buffer
  uint64_t query_asked;                          // the first queries are on their way
  TileWork work[2];
  ShareScratch scratch;
};

/// Bytes of a query tile of one warpgroup, of a key tile, and of all of a block's shared memory.
constexpr int32_t query_bytes(int32_t dim) { return kGroupQueries * dim * 2; }
constexpr int32_t slot_bytes(int32_t dim) { return warpgroup_keys(dim) * dim * 2; }
constexpr size_t block_bytes(int32_t dim, int32_t groups, int32_t slots, int32_t query_buffers) {
  return static_cast<size_t>(slots) * slot_bytes(dim) + static_cast<size_t>(query_buffers * groups) * query_bytes(dim) +
         sizeof(BlockControl);
}

struct BlockMemory {
  unsigned char* ring;   // [slots]
  unsigned char* query;  // [buffers][warpgroups]
  BlockControl* control;
};

/// Position in a ring of `size` slots or buffers; `parity` changes with every round.
struct RingPlace {
  int32_t index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void step(int32_t size) {
    if (++index == size) {
      index = 0;
      parity ^= 1;
    }
  }
};

/// Byte offset of a 16-byte chunk of a row in a tile whose panels have `rows` rows.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk, int rows) {
  return static_cast<uint32_t>(chunk / 8 * rows * kPanelRowBytes + row * kPanelRowBytes + ((chunk ^ row) % 8) * 16);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/// One thread: all key and value tiles of the share, in the order in which they are used. The scores of a tile come
/// before the values of the tile before it.
template <int kDim>
__device__ __forceinline__ void stream_keys(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                            const RaggedMaps& maps, const BlockMemory& memory, ShareWalk walk) {
  constexpr int kKeys = warpgroup_keys(kDim), kPanels = kDim / kPanelWidth;
  BlockControl& control = *memory.control;
  RingPlace place;
  prefetch_map(maps.key_rows);
  prefetch_map(maps.value_rows);
  if (params.key != nullptr) {
    prefetch_map(maps.key);
    prefetch_map(maps.value);
  }
  while (walk.more()) {
    const QueryTile tile = query_tile<kKeys>(params, plan, walk.left.tile);
    const TilePart part = walk.part(tile);
    walk.step(part);
    if (tile.keys.tiles == 0) continue;
    const int32_t start = static_cast<int32_t>(params.rows.start(tile.row.row));
    const int32_t kv_head = tile.row.row % params.rows_per_sequence / params.rows_per_kv_head;
    const auto send = [&](const CUtensorMap& past, const CUtensorMap& fresh, int32_t index) {
      const KeyTile keys = tile.keys.at(index, kKeys);
      uint64_t* full = &control.full[place.index];
      unsigned char* slot = memory.ring + place.index * slot_bytes(kDim);
      await(&control.empty[place.index], place.parity ^ 1);
      arrive_with_bytes(full, slot_bytes(kDim));
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        unsigned char* target = slot + panel * kKeys * kPanelRowBytes;
        if (keys.is_new) {
          copy_box(target, fresh, full, panel * kPanelWidth, tile.row.first + keys.begin, kv_head, tile.row.sequence);
        } else {
          copy_box(target, past, full, panel * kPanelWidth, start + keys.begin);
        }
      }
      place.step(plan.slots);
    };
    for (int32_t i = part.begin; i <= part.end; ++i) {
      if (i < part.end) send(maps.key_rows, maps.key, i);
      // A ring full of keys that is asked for before the first queries would delay them.
      await(&control.query_asked, 0);
      if (i > part.begin) send(maps.value_rows, maps.value, i - 1);
    }
  }
}

/// `threads` threads, a multiple of the chunks of a row, numbered by `thread`: packed queries into the buffers; what is
/// not real becomes zero.
template <class T, int kDim>
__device__ __forceinline__ void stream_queries(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                               const BlockMemory& memory, ShareWalk walk, int thread, int threads) {
  constexpr int kKeys = warpgroup_keys(kDim), kChunks = kDim / 8;
  BlockControl& control = *memory.control;
  const int32_t queries = plan.queries(), rows_at_once = threads / kChunks, chunk = thread % kChunks;
  const bool vectors = query_has_vectors(params), live = chunk * 8 < params.key_dim;
  RingPlace place;
  bool first = true;
  while (walk.more()) {
    const QueryTile tile = query_tile<kKeys>(params, plan, walk.left.tile);
    const TilePart part = walk.part(tile);
    walk.step(part);
    await(&control.query_empty[place.index], place.parity ^ 1);
    if (thread == 0) control.work[place.index] = {tile, part, !walk.more()};
    unsigned char* buffer = memory.query + place.index * plan.groups * query_bytes(kDim);
    const T* base = static_cast<const T*>(params.query) + query_offset(params, tile.row, 0, 0) + chunk * 8;
#pragma unroll 8
    for (int m = thread / kChunks; m < queries; m += rows_at_once) {
      const int32_t token = plan.by_group_size.divide(tile.m_begin + m);
      const int32_t head = tile.m_begin + m - token * params.group_size;
      const bool here = live && tile.row.valid(token);
      unsigned char* target =
          buffer + m / kGroupQueries * query_bytes(kDim) + chunk_offset(m % kGroupQueries, chunk, kGroupQueries);
      const T* from = base + head * params.query_strides.head + token * params.query_strides.token;
      if (vectors) {
        cp_async16(target, here ? from : static_cast<const T*>(params.query), here);
      } else {
        Vec16<T> x;
        reinterpret_cast<uint4&>(x) = make_uint4(0, 0, 0, 0);
        if (here) {
#pragma unroll
          for (int j = 0; j < 8; ++j) x.data[j] = from[j];
        }
        store16(reinterpret_cast<T*>(target), x);
      }
    }
    cp_async_commit();
    if (first) arrive(&control.query_asked);
    first = false;
    cp_async_wait<0>();
    publish_to_products();
    arrive(&control.query_full[place.index]);
    place.step(plan.query_buffers);
  }
}
#endif

}  // namespace uncomp::kernels
