// SPDX-License-Identifier: Apache-2.0
// A block, or a cluster of blocks, chooses the tokens of one row. Its warps turn their runs of the row into pooled keys
// and count the highest digit of the keys. That leaves few tokens undecided, those with the digit of the last token
// that stays: they go into a list, every block of the row reads the lists of all, and ranks them. While more tokens are
// undecided than the list holds, further digits are counted, of the places after those of the keys, so that any number
// of equal keys comes to an end. Then each warp writes what stays of its run, in order.
#pragma once

#include "kernels/common/dependent.cuh"
#include "kernels/select_tokens.h"
#include "kernels/select_tokens/choose.cuh"
#include "kernels/select_tokens/keys.cuh"

namespace uncomp::kernels::select_steps {

__device__ inline SelectRow load_row(const SelectTokensParams& p, int32_t row) {
  return select_row(p.length[row], p.keep_len[row], p.columns, p.sink, p.window);
}

/// Where the entries of a row begin and end, and where those of the last row end; clamped to total_keep.
struct Span {
  int32_t start, end, all;
};

/// Sum over a warp of numbers below 2^42.
__device__ __forceinline__ int64_t sum_of_lengths(int64_t x) {
  const uint32_t low = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(x) & 0xffff);
  const uint32_t high = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(x >> 16));
  return (static_cast<int64_t>(high) << 16) + low;
}

/// Called by one warp.
__device__ __noinline__ inline void row_span(const SelectTokensParams& p, int32_t row, int32_t keep, bool one_launch,
                                             Span& span) {
  if (!one_launch) {
    wait_for_previous();
    span = {p.row_start[row], p.row_start[row + 1], p.row_start[p.num_rows]};
    return;
  }
  int64_t before = 0, all = 0;
#pragma unroll 4
  for (int32_t r = threadIdx.x % 32; r < p.num_rows; r += 32) {
    const int32_t other = load_row(p, r).keep;
    all += other;
    before += r < row ? other : 0;
  }
  before = sum_of_lengths(before);
  all = sum_of_lengths(all);
  const int64_t total = p.total_keep;
  span = {static_cast<int32_t>(min_of(before, total)), static_cast<int32_t>(min_of(before + keep, total)),
          static_cast<int32_t>(min_of(all, total))};
}

/// Counters and sums of a block.
struct Scratch {
  ChooseScratch choose;
  Digit digit;
  Span span;
  alignas(8) uint32_t listed;    // undecided tokens of this block; other blocks read this and `sure` as one
  uint32_t sure;                 // tokens of this block that stay for sure
  uint32_t before;               // undecided tokens of the blocks before that stay after all
  uint32_t above[32], kept[32];  // per warp: tokens that stay for sure, undecided ones that stay after all
};
static_assert(sizeof(Scratch) <= 4 * kSelectScratchWords);

__device__ __forceinline__ uint32_t key_at(const uint4& keys, int j) {
  return j < 2 ? (j == 0 ? keys.x : keys.y) : (j == 2 ? keys.z : keys.w);
}

template <int kBits, bool kCached>
__global__ void __launch_bounds__(kSelectMaxThreads)
    select_tokens_kernel(const __grid_constant__ SelectTokensParams p, const __grid_constant__ SelectPlan plan,
                         bool one_launch, uint4* workspace) {
  constexpr uint32_t kList = select_list(kBits);
  extern __shared__ __align__(16) unsigned char shared[];
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared);
  uint32_t* words = reinterpret_cast<uint32_t*>(shared) + kSelectScratchWords;
  Histogram<kBits> histogram{words}, other{words + select_histogram_words(kBits)};
  uint64_t* list = reinterpret_cast<uint64_t*>(words + 2 * select_histogram_words(kBits));
  uint64_t* all = plan.blocks > 1 ? list + kList : list;
  const int32_t thread = threadIdx.x, threads = blockDim.x, lane = thread % 32, warps = threads / 32;
  const int32_t warp = __shfl_sync(kFullWarp, thread / 32, 0);  // known to be the same for the lanes
  const int32_t row = blockIdx.x >> plan.log_blocks;
  const Team team{static_cast<int32_t>(blockIdx.x) & (plan.blocks - 1), plan.blocks};

  // What select_row_start_kernel follows has ended when this kernel begins.
  if (one_launch) wait_for_previous();
  let_next_start();
  const int32_t length = p.length[row], keep_len = p.keep_len[row];

  // ---- the scores, on their way before the row's length is known; later the keys lie in their place
  RowScores scores = RowScores::of(p, row);
  const int32_t owned = plan.warp_chunks * kSelectChunk;  // places of a warp
  const int32_t first = (team.rank * warps + warp) * owned;
  uint4* cache = kCached ? reinterpret_cast<uint4*>(all + kList) + thread
                         : workspace + static_cast<int64_t>(blockIdx.x) * (plan.warp_chunks * threads) + thread;
  if (kCached) {
#pragma unroll 1
    for (int32_t c = 0; c < plan.warp_chunks; ++c) {
      scores.copy4(reinterpret_cast<float4*>(cache + c * threads), first + c * kSelectChunk + 4 * lane);
    }
    cp_async_commit();
  }
  // Beside the warp's run: the places before it in lane 31, those behind it in lane 0.
  const float4 beside = scores.read4(lane == 0 ? first + owned : lane == 31 ? first - 4 : -4);
  histogram.clear();
  other.clear();
  if (thread < 32) scratch.kept[thread] = 0;
  if (thread == 0) scratch.listed = scratch.sure = scratch.before = scratch.choose.count = 0;
  const SelectRow s = select_row(length, keep_len, p.columns, p.sink, p.window);
  scores.head = scores.skip + s.head;
  scores.to = scores.skip + s.tokens - s.tail;
  bool spanned = false;
  const auto find_span = [&] {
    if (spanned) return;
    row_span(p, row, s.keep, one_launch, scratch.span);
    spanned = true;
  };

  // ---- keys, and what their digits leave undecided; the conditions are the same for all blocks of a row
  const int32_t chunks = clamp(ceil_div(scores.to - first, kSelectChunk), 0, plan.warp_chunks);
  const auto each_chunk = [&](const auto& use) {
#pragma unroll 1
    for (int32_t c = 0; c < chunks; ++c) use(cache[c * threads], first + c * kSelectChunk);
  };
  const Ranked ranked = Ranked::of(p.columns + 3);
  Undecided undecided{64, 64, 0, static_cast<uint32_t>(s.need), 0};
  if (s.need > 0) {
    if (kCached) cp_async_wait<0>();
    const auto chunk_scores = [&](int32_t c) -> float4 {
      if (kCached) return reinterpret_cast<const float4&>(cache[c * threads]);
      return scores.read4(first + c * kSelectChunk + 4 * lane);
    };
    float4 left = beside, middle = chunk_scores(0);
#pragma unroll 1
    for (int32_t c = 0; c < chunks; ++c) {
      const float4 right = c + 1 < plan.warp_chunks ? chunk_scores(c + 1) : beside;
      cache[c * threads] = make_keys(p, plan, scores, first + c * kSelectChunk, lane, left, middle, right);
      left = middle;
      middle = right;
    }
    __syncthreads();  // the histograms are clear
    for (;;) {
      undecided.begin_digit(kBits);
      each_chunk([&](const uint4& keys, int32_t chunk) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t key = key_at(keys, j);
          if (key == kNoCandidate) continue;
          if (undecided.above == 64) {
            atomicAdd(&histogram.bin()[key >> (32 - kBits)], 1u);
            continue;
          }
          const uint64_t rank = ranked.rank(key, chunk + 4 * lane + j);
          if (undecided.has(rank)) atomicAdd(&histogram.bin()[undecided.digit(rank)], 1u);
        }
      });
      histogram.find(team, undecided.need, scratch.digit, find_span);
      undecided.end_digit(scratch.digit);
      if (undecided.inside <= kList) break;
      // The blocks that read `other` have passed a barrier since.
      const Histogram<kBits> used = histogram;
      histogram = other;
      other = used;
      histogram.clear();
      __syncthreads();
    }

    // ---- what lies above stays; the undecided tokens go into the list
    other.clear();
    const uint64_t lowest = max_of(undecided.prefix << undecided.shift, uint64_t{1} << 32);
    const uint64_t highest = (undecided.prefix << undecided.shift) + ((uint64_t{1} << undecided.shift) - 1);
    uint32_t above = 0;
    each_chunk([&](const uint4& keys, int32_t chunk) {
      const uint32_t high_key = static_cast<uint32_t>(highest >> 32), low_key = static_cast<uint32_t>(lowest >> 32);
      uint32_t inside = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t key = key_at(keys, j);
        above += key > high_key;
        inside |= key >= low_key && key <= high_key ? 1u << j : 0u;
      }
      if (undecided.shift < 32) {  // the places decide between keys at either end
        const uint32_t maybe = inside;
        inside = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint64_t rank = ranked.rank(key_at(keys, j), chunk + 4 * lane + j);
          if ((maybe >> j & 1) == 0) continue;
          above += rank > highest;
          inside |= rank >= lowest && rank <= highest ? 1u << j : 0u;
        }
      }
#pragma unroll 1
      for (; inside != 0; inside &= inside - 1) {
        const int j = __ffs(static_cast<int>(inside)) - 1;
        list[atomicAdd(&scratch.listed, 1u)] = ranked.rank(key_at(keys, j), chunk + 4 * lane + j);
      }
    });
    above = __reduce_add_sync(kFullWarp, above);
    if (lane == 0) {
      scratch.above[warp] = above;
      atomicAdd(&scratch.sure, above);
    }
    team.barrier();
  } else {
    if (warp == warps - 1) find_span();
    __syncthreads();
  }

  // ---- row_start, the tail that no row fills, tokens that stay in any case
  const Span span = scratch.span;
  if (one_launch && team.rank == 0 && thread == 0) {
    p.row_start[row] = span.start;
    if (row == p.num_rows - 1) p.row_start[p.num_rows] = span.all;
  }
#pragma unroll 1
  for (int64_t i = int64_t{span.all} + static_cast<int64_t>(blockIdx.x) * threads + thread; i < p.total_keep;
       i += static_cast<int64_t>(gridDim.x) * threads) {
    p.index[i] = -1;
  }
  int32_t* out = p.index + span.start;
  const int32_t room = span.end - span.start;
  const auto put = [&](int32_t place, int32_t column) {
    if (place < room) out[place] = column;
  };
#pragma unroll 1
  for (int32_t i = team.rank * threads + thread; i < s.head + s.tail; i += team.blocks * threads) {
    const bool front = i < s.head;
    put(front ? i : s.keep - s.tail + (i - s.head), front ? i : s.tokens - s.tail + (i - s.head));
  }
  if (s.need == 0) return;

  // ---- the lists of all blocks, the last token that stays
  uint32_t mine = 0, sure = 0;  // entries of the blocks before this one; tokens of theirs that stay for sure
  if (team.blocks > 1) {
    const uint2 theirs = cluster_read2(reinterpret_cast<const uint2*>(&scratch.listed), lane & (team.blocks - 1));
    const uint32_t listed = lane < team.blocks ? theirs.x : 0u, start = sum_upto(listed, lane) - listed;
    sure = __reduce_add_sync(kFullWarp, lane < team.rank ? theirs.y : 0u);
    mine = __shfl_sync(kFullWarp, start, team.rank);
    // Each warp copies entries of one block.
    const int32_t of_block = max_of(warps >> plan.log_blocks, 1);
#pragma unroll 1
    for (int32_t r = warp & (team.blocks - 1); r < team.blocks; r += min_of(warps, team.blocks)) {
      const uint32_t begin = __shfl_sync(kFullWarp, start, r), count = __shfl_sync(kFullWarp, listed, r);
#pragma unroll 1
      for (uint32_t i = (warp >> plan.log_blocks) * 32 + lane; i < count; i += 32 * of_block) {
        const uint2 entry = cluster_read2(reinterpret_cast<const uint2*>(list + i), r);
        all[begin + i] = static_cast<uint64_t>(entry.y) << 32 | entry.x;
      }
    }
    __syncthreads();
    cluster_arrive();  // this block no longer reads the others
  }
  const uint64_t last = choose_last(all, undecided, other, scratch.choose);

  // ---- undecided tokens that stay after all: in the blocks before, in each warp of this block
#pragma unroll 1
  for (uint32_t i = thread; i < mine + scratch.listed; i += threads) {
    if (all[i] < last) continue;
    if (i < mine) {
      atomicAdd(&scratch.before, 1u);
    } else {
      atomicAdd(&scratch.kept[ranked.place(all[i]) / owned - team.rank * warps], 1u);
    }
  }
  __syncthreads();
  uint32_t at = __reduce_add_sync(kFullWarp, lane < warp ? scratch.above[lane] + scratch.kept[lane] : 0u);
  at += s.head + sure + scratch.before;

  // ---- ordered writing
  const uint32_t lower = (1u << lane) - 1;
  each_chunk([&](const uint4& keys, int32_t chunk) {
    const uint32_t largest = max_of(max_of(keys.x, keys.y), max_of(keys.z, keys.w));
    if (!__any_sync(kFullWarp, largest >= static_cast<uint32_t>(last >> 32))) return;
    uint32_t ahead = at, stays = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool stay = ranked.rank(key_at(keys, j), chunk + 4 * lane + j) >= last;
      const unsigned votes = __ballot_sync(kFullWarp, stay);
      ahead += __popc(votes & lower);
      at += __popc(votes);
      stays |= stay ? 1u << j : 0u;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (stays >> j & 1) put(static_cast<int32_t>(ahead++), chunk + 4 * lane + j - scores.skip);
    }
  });
  if (team.blocks > 1) cluster_wait();  // the others may still read this block
}

}  // namespace uncomp::kernels::select_steps
