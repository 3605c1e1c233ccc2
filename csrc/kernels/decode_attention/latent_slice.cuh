// SPDX-License-Identifier: Apache-2.0
// attend_slice over latents: the keys of a warp's slots are made in registers, 16 channels at a time, and are the
// operand of the product with the queries as they leave the accumulators. They are never written anywhere.
#pragma once

#include "kernels/decode_attention/latent_shared.cuh"
#include "kernels/decode_attention/latent_turn.cuh"

namespace uncomp::kernels {

/// What attend_latents needs of the row beside the arena.
struct LatentRow {
  const int32_t* position;  // of its first slot; null where nothing turns
  uint32_t offset;
  float norm_eps;
  bool norm, weighted;
};

__device__ __forceinline__ int32_t position_offset(const KeyTransformParams& transform, int64_t sequence) {
  return transform.position_offset == nullptr ? 0 : transform.position_offset[sequence];
}

__device__ __forceinline__ LatentRow latent_row(const KeyTransformParams& transform, int64_t slot, int64_t sequence) {
  return {transform.pairs == 0 ? nullptr : transform.slot_position + slot,
          static_cast<uint32_t>(position_offset(transform, sequence)), transform.norm_eps, transform.norm != nullptr,
          weighs_channels(transform)};
}

/// A tile of 16 slots from `first` on joins the running softmax and the sums: its scores [slots, heads], its values at
/// `values` in the ring.
template <class T, int kValue, int kNTiles, class OnScore>
__device__ __forceinline__ void add_values(RunningSoftmax<kNTiles>& softmax, float (&score)[kNTiles][4],
                                           float (&out)[kValue / 16][kNTiles][4], const T* values, int value_at,
                                           int first, int count, OnScore& on_score) {
  const int lane = threadIdx.x % 32, slot = first + lane / 4;
  // A lane holds slots lane / 4 and + 8 of two neighbouring heads.
  if (first + 16 > count) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = slot + i / 2 * 8 < count ? score[n][i] : -INFINITY;
    }
  }
  if constexpr (!std::is_same_v<OnScore, NoScores>) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int my_slot = slot + i / 2 * 8;
        if (my_slot < count) on_score(my_slot, 8 * n + 2 * (lane % 4) + i % 2, score[n][i]);
      }
    }
  }
  if (softmax.exceeded(score)) {
    float shrink[kNTiles][2];
    softmax.shift(score, shrink);
#pragma unroll
    for (int c = 0; c < kValue / 16; ++c) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[c][n][i] *= shrink[n][i % 2];
      }
    }
  }
  uint32_t weight[kNTiles][2];
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) score[n][i] = exp2_fast(score[n][i] - softmax.base[n][i % 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i) softmax.sum[n][i] += score[n][i] + score[n][i + 2];
    weight[n][0] = transpose_8x8(pack2<T>(score[n][0], score[n][1]));
    weight[n][1] = transpose_8x8(pack2<T>(score[n][2], score[n][3]));
  }
  // out^T [channels, heads] += values^T * weights^T.
#pragma unroll
  for (int c = 0; c < kValue / 16; ++c) {
    uint32_t v[4];
    ldmatrix_x4_trans(v, values + chunks_on(value_at, 2 * c));
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) mma_16x8x16<T>(out[c][n], v, weight[n]);
  }
}

/// Slots 0 .. count - 1 of latents [.., r] and values [.., Dv]; like attend_slice in all else.
template <class T, class Shape, class OnScore = NoScores, class Prepare = NoPrepare>
__device__ __forceinline__ void attend_latents(LatentShared<T, Shape>& shared, const LatentTables<T>& tables, int dim,
                                               const LatentRow& row, const T* latent, const T* value, int count,
                                               int rank, int value_dim, int heads, float scale_log2,
                                               OnScore on_score = {}, Prepare prepare = {}) {
  using Shared = LatentShared<T, Shape>;
  constexpr int kRank = Shape::kRank, kValue = Shape::kValue, kNTiles = Shape::kHeads / 8, kSteps = kRank / 16;
  constexpr int kSlots = Shape::kSlots, kTiles = kSlots / 16, kStages = Shape::kStages;
  constexpr bool kKeepLatents = kValue * Shape::kHeads < 4096;  // in registers
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warp takes groups of slots that follow one another.
  const int all_groups = (count + kSlots - 1) / kSlots, first_group = warp * all_groups / Shape::kWarps;
  const int groups = (warp + 1) * all_groups / Shape::kWarps - first_group, offset = first_group * kSlots;
  T* const ring = shared.ring[warp][0];

  const RowCopies<T, kRank> latent_copies(lane);
  const RowCopies<T, kValue> value_copies(lane);
  const auto load_latents = [&](int group, int stage) {
    if (group < groups) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        latent_copies.issue(ring + stage * (Shared::kLatents + Shared::kValues) + m * 16 * kRank, latent, rank,
                            group * kSlots + offset + 16 * m, count);
      }
    }
    cp_async_commit();
  };
  const auto load_values = [&](int group, int stage) {
    if (group < groups) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        value_copies.issue(ring + stage * (Shared::kLatents + Shared::kValues) + Shared::kLatents + m * 16 * kValue,
                           value, value_dim, group * kSlots + offset + 16 * m, count);
      }
    }
    cp_async_commit();
  };
  uint32_t next_position;  // of slot `lane` of the group
  const auto load_positions = [&](int group) {
    const int slot = group * kSlots + offset + lane;
    next_position =
        row.position != nullptr && lane < kSlots && slot < count ? static_cast<uint32_t>(row.position[slot]) : 0;
  };
  for (int stage = 0; stage < kStages; ++stage) {
    load_latents(stage, stage);
    load_values(stage, stage);
  }
  load_positions(0);
  const bool by_table = Shape::kSpan > 0 && row.position != nullptr && count >= 2 * Shape::kWarps * kSlots;
  prepare(by_table);

  const int latent_at = ring_offset<kRank>(lane % 16, lane / 16);
  const int value_at = ring_offset<kValue>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const T* const basis_at = tables.basis + lane % 16 * tables.stride + lane / 16 * 8;
  T* const turned_query = tables.turned + warp * heads * tables.stride;
  const float* const bias_at = tables.bias + lane % 4 * 4;
  const float* const weight_at = tables.weight + lane % 4 * 2;
  const uint32_t* const turn_at = tables.turn + lane % 4 * 2;

  float out[kValue / 16][kNTiles][4] = {};  // [channel, head] tiles
  RunningSoftmax<kNTiles> softmax;
  int stage = 0;
  uint32_t turned = kNowhere;  // what the warp's queries are turned back by
  for (int group = 0; group < groups; ++group) {
    cp_async_wait<2 * kStages - 1>();
    __syncwarp();
    const T* const latents = ring + stage * (Shared::kLatents + Shared::kValues);
    uint32_t a[kTiles][kKeepLatents ? kSteps : 1][4];
    if constexpr (kKeepLatents) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) ldmatrix_x4(a[m][k], latents + m * 16 * kRank + chunks_on(latent_at, 2 * k));
      }
      __syncwarp();  // all lanes have read what the next copies overwrite
      load_latents(group + kStages, stage);
    }
    const uint32_t position = next_position + row.offset;
    load_positions(group + 1);
    bool follow = false;  // whether the positions of the group follow one another
    uint32_t ahead = 0;   // of what the queries are turned back by
    if constexpr (Shape::kSpan > 0) {
      if (by_table) {
        const uint32_t first = __shfl_sync(0xffffffffu, position, 0);
        follow =
            __all_sync(0xffffffffu, position == first + lane || lane >= min(kSlots, count - group * kSlots - offset));
        if (follow && !serves<Shape::kSpan, kSlots>(turned, first)) {
          turn_back<T, Shape::kHeads>(turned_query, tables.query, tables.stride, tables.turn, dim, heads, first);
          turned = first;
        }
        ahead = first - turned;
      }
    }

    // Scores [slots, heads]: 16 channels of the keys at a time.
    float score[kTiles][kNTiles][4] = {}, squares[kTiles][2] = {};
    const auto make_and_meet = [&]<bool kWeighted, bool kFollow>(std::bool_constant<kWeighted>,
                                                                 std::bool_constant<kFollow>) {
      uint32_t at[2 * kTiles];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if constexpr (!kFollow) at[i] = __shfl_sync(0xffffffffu, position, lane / 4 + 8 * i);
      }
      const uint4* const turns = tables.turns + ahead / 16 * 32 + lane;
      const T* const queries = kFollow ? turned_query : tables.query;
#pragma unroll 1
      for (int place = 0; place < dim; place += 16) {
        float key[kTiles][2][4];  // one of each pair, the other
        const float4 bias[2] = {*reinterpret_cast<const float4*>(bias_at + 2 * place),
                                *reinterpret_cast<const float4*>(bias_at + 2 * place + 16)};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, basis_at + 16 * k * tables.stride + place);
          const uint32_t one[2] = {b[0], b[1]}, other[2] = {b[2], b[3]};
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            if constexpr (!kKeepLatents) ldmatrix_x4(a[m][0], latents + m * 16 * kRank + chunks_on(latent_at, 2 * k));
            const auto& latent = a[m][kKeepLatents ? k : 0];
            if (k == 0) {
              mma_16x8x16_onto<T>(key[m][0], bias[0], latent, one);
              mma_16x8x16_onto<T>(key[m][1], bias[1], latent, other);
            } else {
              mma_16x8x16<T>(key[m][0], latent, one);
              mma_16x8x16<T>(key[m][1], latent, other);
            }
          }
        }
        if constexpr (kWeighted) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 weight = *reinterpret_cast<const float2*>(weight_at + place + 8 * h);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                squares[m][i / 2] += key[m][h][i] * key[m][h][i];
                key[m][h][i] *= i % 2 == 0 ? weight.x : weight.y;
              }
            }
          }
        }
        uint32_t operand[kTiles][4];
        if constexpr (kFollow) {
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            const uint4 by = turns[place / 16 * (Shape::kSpan / 16) * 32 + m * 32];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              operand[m][i] = pack2<T>(key[m][0][2 * i], key[m][0][2 * i + 1]);
              operand[m][i + 2] = pack2<T>(key[m][1][2 * i], key[m][1][2 * i + 1]);
              turn2<T>(operand[m][i], operand[m][i + 2], i == 0 ? by.x : by.z, i == 0 ? by.y : by.w);
            }
          }
        } else {
          const uint2 turn = *reinterpret_cast<const uint2*>(turn_at + place / 2);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 by = cos_sin(at[2 * m + i / 2], i % 2 == 0 ? turn.x : turn.y);
              const float x = key[m][0][i], y = key[m][1][i];
              key[m][0][i] = x * by.x - y * by.y;
              key[m][1][i] = y * by.x + x * by.y;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              operand[m][2 * h] = pack2<T>(key[m][h][0], key[m][h][1]);
              operand[m][2 * h + 1] = pack2<T>(key[m][h][2], key[m][h][3]);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          const int head = kFollow ? min(8 * n + lane / 4, heads - 1) : 8 * n + lane / 4;
          const T* const query = queries + head * tables.stride + lane % 4 * 2 + place;
          const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(query),
                                 *reinterpret_cast<const uint32_t*>(query + 8)};
#pragma unroll
          for (int m = 0; m < kTiles; ++m) mma_16x8x16<T>(score[m][n], operand[m], b);
        }
      }
    };
    if (Shape::kSpan > 0 && follow) {
      if (row.weighted) {
        make_and_meet(std::true_type{}, std::bool_constant<(Shape::kSpan > 0)>{});
      } else {
        make_and_meet(std::false_type{}, std::bool_constant<(Shape::kSpan > 0)>{});
      }
    } else if (row.weighted) {
      make_and_meet(std::true_type{}, std::false_type{});
    } else {
      make_and_meet(std::false_type{}, std::false_type{});
    }
    if constexpr (!kKeepLatents) {
      __syncwarp();
      load_latents(group + kStages, stage);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float scale[2] = {scale_log2, scale_log2};
      if (row.norm) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float sum = squares[m][i] + __shfl_xor_sync(0xffffffffu, squares[m][i], 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          scale[i] *= rsqrtf(sum / static_cast<float>(dim) + row.norm_eps);
        }
      }
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][n][i] *= scale[i / 2];
      }
    }

    cp_async_wait<2 * kStages - 1>();
    __syncwarp();
    const T* const values = latents + Shared::kLatents;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      add_values<T, kValue>(softmax, score[m], out, values + m * 16 * kValue, value_at,
                            group * kSlots + offset + 16 * m, count, on_score);
    }
    __syncwarp();
    load_values(group + kStages, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  cp_async_wait<0>();
  __syncthreads();
  store_states(shared, softmax, out);
}

}  // namespace uncomp::kernels
