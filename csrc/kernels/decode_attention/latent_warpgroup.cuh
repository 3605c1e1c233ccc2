// SPDX-License-Identifier: Apache-2.0
// A block of decode_attention over latents on sm_90a, for keys of 128 channels that all turn and have neither bias nor
// norm: four warps make the keys of 64 slots together (wgmma), which reads the basis once for all and behind their
// backs. The parts are those of latent_block.cuh; sizes are fixed.
#pragma once

#include "kernels/common/warpgroup.cuh"
#include "kernels/decode_attention/decode_attention.h"
#include "kernels/decode_attention/latent_block.cuh"
#include "kernels/ragged_attention/wgmma.cuh"

namespace uncomp::kernels {

template <class T>
struct alignas(1024) WarpgroupShared {
  static constexpr int kWarps = 12, kThreads = 32 * kWarps, kHeads = 8, kDim = 128, kRank = 64, kValue = 64;
  static constexpr int kStages = 2, kSpan = 64, kStride = kDim + 8, kOutStride = kValue + 4;
  T basis[kDim / 64][64 * kRank];  // panels of 64 places
  union {
    T ring[kWarps][kStages][16 * (kRank + kValue)];  // 16 slots of latents, then their values
    float out[kWarps][kHeads][kOutStride];           // unnormalised
  };
  uint4 turns[kDim / 16 * (kSpan / 16) * 32];  // fill_turns
  uint4 own_turns[kWarps][kDim / 16 * 32];     // of 16 slots that do not follow one another
  T query[kHeads * kStride];
  T turned[kWarps][kHeads * kStride];  // queries turned back
  float frequency[kDim / 2];
  uint32_t turn[kDim / 2];  // parts of 2^32 of a full turn a token
  float top[kWarps][kHeads];
  float sum[kWarps][kHeads];
};

/// c[64 x 64] = A * B, as product_columns, which adds.
template <class T>
__device__ __forceinline__ void first_product_columns(float (&c)[32], const uint32_t (&a)[4], uint64_t b);
template <>
__device__ __forceinline__ void first_product_columns<__half>(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
      "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, "
      "%35}, %36, 0, 1, 1, 1;\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3]), "=f"(c[4]), "=f"(c[5]), "=f"(c[6]), "=f"(c[7]), "=f"(c[8]),
        "=f"(c[9]), "=f"(c[10]), "=f"(c[11]), "=f"(c[12]), "=f"(c[13]), "=f"(c[14]), "=f"(c[15]), "=f"(c[16]),
        "=f"(c[17]), "=f"(c[18]), "=f"(c[19]), "=f"(c[20]), "=f"(c[21]), "=f"(c[22]), "=f"(c[23]), "=f"(c[24]),
        "=f"(c[25]), "=f"(c[26]), "=f"(c[27]), "=f"(c[28]), "=f"(c[29]), "=f"(c[30]), "=f"(c[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void first_product_columns<__nv_bfloat16>(float (&c)[32], const uint32_t (&a)[4],
                                                                     uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, "
      "%35}, %36, 0, 1, 1, 1;\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3]), "=f"(c[4]), "=f"(c[5]), "=f"(c[6]), "=f"(c[7]), "=f"(c[8]),
        "=f"(c[9]), "=f"(c[10]), "=f"(c[11]), "=f"(c[12]), "=f"(c[13]), "=f"(c[14]), "=f"(c[15]), "=f"(c[16]),
        "=f"(c[17]), "=f"(c[18]), "=f"(c[19]), "=f"(c[20]), "=f"(c[21]), "=f"(c[22]), "=f"(c[23]), "=f"(c[24]),
        "=f"(c[25]), "=f"(c[26]), "=f"(c[27]), "=f"(c[28]), "=f"(c[29]), "=f"(c[30]), "=f"(c[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/// Slots 0 .. count - 1 of latents [.., rank] and values [.., value_dim]; `land` waits for what the caller's own copies
/// bring, `by_table` tells it whether the table of turns is wanted.
template <class T, class Land>
__device__ __forceinline__ void attend_together(WarpgroupShared<T>& shared, const int32_t* positions, uint32_t offset,
                                                const T* latent, const T* value, int count, int rank, int value_dim,
                                                int heads, float scale_log2, Land land) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = WarpgroupShared<T>;
  constexpr int kRank = Shared::kRank, kValue = Shared::kValue, kDim = Shared::kDim, kSteps = kRank / 16;
  constexpr int kParts = kDim / 64, kStages = Shared::kStages, kStride = Shared::kStride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warp takes groups of 16 slots that follow one another; all warps as many, for they multiply together.
  const int groups = ((count + 15) / 16 + Shared::kWarps - 1) / Shared::kWarps, first_slot = warp * groups * 16;
  T* const ring = shared.ring[warp][0];
  constexpr int kStageSize = 16 * (kRank + kValue);

  const RowCopies<T, kRank> latent_copies(lane);
  const RowCopies<T, kValue> value_copies(lane);
  const auto load_latents = [&](int group, int stage) {
    if (group < groups) latent_copies.issue(ring + stage * kStageSize, latent, rank, first_slot + group * 16, count);
    cp_async_commit();
  };
  const auto load_values = [&](int group, int stage) {
    if (group < groups) {
      value_copies.issue(ring + stage * kStageSize + 16 * kRank, value, value_dim, first_slot + group * 16, count);
    }
    cp_async_commit();
  };
  uint32_t next_position;  // of slot `lane` of the group
  const auto load_position = [&](int group) {
    const int slot = first_slot + group * 16 + lane;
    next_position = lane < 16 && slot < count ? static_cast<uint32_t>(positions[slot]) : 0;
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    load_latents(stage, stage);
    load_values(stage, stage);
  }
  load_position(0);
  const bool by_table = groups > 2;
  land(by_table);

  const int latent_at = ring_offset<kRank>(lane % 16, lane / 16);
  const int value_at = ring_offset<kValue>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const int query_at = min(lane / 4, heads - 1) * kStride + lane % 4 * 2;
  const uint64_t basis = columns_operand(shared_address(shared.basis[0]), 0);

  float out[kValue / 16][1][4] = {};  // [channel, head] tiles
  RunningSoftmax<1> softmax;
  float key[kParts][32];
  uint32_t turned = kNowhere;  // what the warp's queries are turned back by
  int stage = 0;
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    const uint32_t position = next_position + offset;
    load_position(group + 1);
    const uint32_t first = __shfl_sync(0xffffffffu, position, 0);
    const int live = min(16, count - first_slot - group * 16);
    const uint4* turns;
    const T* query = shared.turned[warp];
    int step = Shared::kSpan / 16 * 32;
    if (by_table && __all_sync(0xffffffffu, position == first + lane || lane >= live)) {
      if (!serves<Shared::kSpan, 16>(turned, first)) {
        turn_back<T, Shared::kHeads>(shared.turned[warp], shared.query, kStride, shared.turn, kDim, heads, first);
        turned = first;
      }
      turns = shared.turns + (first - turned) / 16 * 32 + lane;
    } else {
      const uint32_t near = __shfl_sync(0xffffffffu, position, lane / 4);
      const uint32_t behind = __shfl_sync(0xffffffffu, position, lane / 4 + 8);
      uint4* const own = shared.own_turns[warp] + lane;  // a lane reads what it wrote
#pragma unroll 2
      for (int i = 0; i < kDim / 16; ++i) {
        own[i * 32] = turns_at<T>(near, behind, *reinterpret_cast<const uint2*>(shared.turn + i * 8 + lane % 4 * 2));
      }
      turns = own;
      query = shared.query;
      step = 32;
    }

    cp_async_wait<2 * kStages - 1>();
    __syncwarp();
    uint32_t a[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) ldmatrix_x4(a[k], ring + stage * kStageSize + chunks_on(latent_at, 2 * k));
    __syncwarp();  // all lanes have read what the next copies overwrite
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint64_t panel = operand_at(basis, part * 64 * kRank * static_cast<int>(sizeof(T)));
      wgmma_fence();
      first_product_columns<T>(key[part], a[0], panel);
#pragma unroll
      for (int k = 1; k < kSteps; ++k) product_columns<T>(key[part], a[k], operand_at(panel, 2048 * k));
      wgmma_commit();
    }
    load_latents(group + kStages, stage);

    float score[1][4] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {  // keys of 64 channels turn and meet the queries
      part + 1 < kParts ? wgmma_wait<kParts - 1>() : wgmma_wait<0>();
      wgmma_settle(key[part]);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float* const x = &key[part][8 * p];
        const float* const y = x + 4;
        const uint4 by = turns[(4 * part + p) * step];
        uint32_t operand[4] = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(y[0], y[1]), pack2<T>(y[2], y[3])};
        turn2<T>(operand[0], operand[2], by.x, by.y);
        turn2<T>(operand[1], operand[3], by.z, by.w);
        const T* const meets = query + query_at + 64 * part + 16 * p;
        const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(meets),
                               *reinterpret_cast<const uint32_t*>(meets + 8)};
        mma_16x8x16<T>(score[0], operand, b);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) score[0][i] *= scale_log2;

    cp_async_wait<2 * kStages - 1>();
    __syncwarp();
    NoScores ignored;
    add_values<T, kValue>(softmax, score, out, ring + stage * kStageSize + 16 * kRank, value_at,
                          first_slot + group * 16, count, ignored);
    __syncwarp();
    load_values(group + kStages, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  cp_async_wait<0>();
  __syncthreads();
  store_states(shared, softmax, out);
#endif
}

/// As LatentBlock, for decode_attention.
template <class T>
struct WarpgroupBlock {
  using Shared = WarpgroupShared<T>;
  static constexpr int kWarps = Shared::kWarps, kThreads = Shared::kThreads, kBlocks = 1;

  Shared& shared;
  const KeyTransformParams& transform;
  int rank, loaded = -1;  // KV head of the basis
  bool filled = false;    // the table of turns

  __device__ __forceinline__ WarpgroupBlock(void* memory, const KeyTransformParams& transform, int rank)
      : shared(*static_cast<Shared*>(memory)), transform(transform), rank(rank) {}

  static size_t bytes(int, int) { return sizeof(Shared); }

  /// Whether this block computes what is asked for; copies of 16 bytes want aligned queries.
  static bool takes(const DecodeAttentionParams& params, const KeyTransformParams& transform) {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return transform.dim == Shared::kDim && 2 * transform.pairs == Shared::kDim && transform.bias == nullptr &&
           transform.norm == nullptr && aligned(params.query) && params.query_batch_stride % 8 == 0 &&
           params.query_head_stride % 8 == 0 && aligned(transform.frequency);
  }

  __device__ __forceinline__ void attend(const LatentQuery<T>& q, const T* key_rows, const T* value_rows, int64_t slot,
                                         int count, int value_dim, float scale_log2) {
    constexpr int kDim = Shared::kDim;
    const int thread = opaque_thread(), place = thread % 16 * 8, channel = channel_at(place, kDim, kDim / 2);
    const bool first = loaded < 0;
    if (q.kv_head != loaded) {
      const T* const basis = static_cast<const T*>(transform.basis) + static_cast<int64_t>(q.kv_head) * rank * kDim;
      for (int k = thread / 16; k < Shared::kRank; k += kThreads / 16) {
        cp_async16(shared.basis[place / 64] + k * 64 + ((place % 64 / 8) ^ (k % 8)) * 8,
                   k < rank ? basis + k * kDim + channel : basis, k < rank);
      }
      loaded = q.kv_head;
    }
    if (const int head = thread / 16; head < Shared::kHeads) {
      const bool real = head < q.heads;
      cp_async16(shared.query + head * Shared::kStride + place,
                 real ? q.query + head * q.head_stride + channel : q.query, real);
    } else if (first && head == Shared::kHeads) {
      cp_async16(shared.frequency + thread % 16 * 4, transform.frequency + thread % 16 * 4, true);
    }
    cp_async_commit();
    attend_together(shared, transform.slot_position + slot,
                    static_cast<uint32_t>(position_offset(transform, q.sequence)), key_rows + slot * rank,
                    value_rows + slot * value_dim, count, rank, value_dim, q.heads,
                    scale_log2 * logit_factor(transform), [&](bool by_table) {
                      cp_async_wait<2 * Shared::kStages>();  // behind basis, queries and frequencies come the rings
                      fence_for_products();
                      __syncthreads();
                      if (first) {
                        if (thread < kDim / 2) shared.turn[thread] = turn32(shared.frequency[thread]);
                        __syncthreads();
                      }
                      if (by_table && !filled) {
                        fill_turns<T, Shared::kSpan / 16, kThreads>(shared.turns, shared.turn, kDim);
                        filled = true;
                        __syncthreads();
                      }
                    });
  }

 private:
  /// What this thread's copies brought is there for matrix instructions, behind a barrier.
  __device__ __forceinline__ static void fence_for_products() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
  }
};

}  // namespace uncomp::kernels
