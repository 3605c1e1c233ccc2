// SPDX-License-Identifier: Apache-2.0
// Launches of the tensor-core kernels for one half-precision type: the smallest head-dim tile that holds head_dim.
#pragma once

#include <utility>

#include "core/dispatch.h"
#include "kernels/runtime.h"
#include "kernels/window_scores/lse_pass.cuh"
#include "kernels/window_scores/score_pass.cuh"
#include "kernels/window_scores/stream_lse.cuh"
#include "kernels/window_scores/stream_scores.cuh"
#include "kernels/window_scores/vote_pass.cuh"

namespace uncomp::kernels {

/// Shared memory of a block on the smallest of our devices, static part included.
inline constexpr size_t kSmallestSharedMemory = 99 * 1024;

template <class Pass>
cudaError_t launch(void (*kernel)(Pass), const Pass& pass, dim3 grid, size_t shared, cudaStream_t stream) {
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared); err != cudaSuccess) {
    return err;
  }
  kernel<<<grid, kWindowThreads, shared, stream>>>(pass);
  return cudaGetLastError();
}

template <class T, class F>
cudaError_t with_tile(int32_t head_dim, F&& f) {
  cudaError_t err = cudaErrorInvalidValue;
  dispatch_int<64, 128, 256>(head_dim_tile(head_dim), [&](auto tile) { err = f(tile); });
  return err;
}

template <class T>
cudaError_t launch_lse_pass(const LsePass& pass, int64_t items, cudaStream_t stream) {
  return with_tile<T>(pass.params.head_dim, [&](auto tile) {
    using Tile = Tile<T, tile()>;
    constexpr size_t kStateBytes = Tile::kMaxQueries / 8 * kWindowThreads * sizeof(LogSum);
    static_assert(Tile::kMaxQueries * tile() * sizeof(T) + Tile::kKeyBytes + kStateBytes <= kSmallestSharedMemory);
    const int32_t all = pass.params.group_size * pass.params.window;
    const int32_t queries = min_of(round_up(all, 16), Tile::kMaxQueries);
    const size_t shared =
        queries * tile() * sizeof(T) + Tile::kKeyBytes + queries / 8 * kWindowThreads * sizeof(LogSum);
    const dim3 grid(static_cast<unsigned>(items), ceil_div(all, Tile::kMaxQueries));
    return launch(&lse_pass_kernel<T, tile()>, pass, grid, shared, stream);
  });
}

template <class T>
cudaError_t launch_score_pass(const ScorePass& pass, int64_t items, cudaStream_t stream) {
  return with_tile<T>(pass.params.head_dim, [&](auto tile) {
    using Tile = Tile<T, tile()>;
    static_assert(Tile::kMaxQueries * (tile() * sizeof(T) + 8) + Tile::kKeyBytes <= kSmallestSharedMemory);
    const HeadTiles heads = HeadTiles::of(pass.params.group_size, pass.params.window, Tile::kMaxQueries);
    const int32_t queries = round_up(heads.heads_per_chunk * heads.tiles_per_head, 2) * kQueryTile;
    const size_t shared = queries * tile() * sizeof(T) + Tile::kKeyBytes;
    return launch(&score_pass_kernel<T, tile()>, pass, dim3(static_cast<unsigned>(items)), shared, stream);
  });
}

template <class T>
cudaError_t streams_built(int32_t head_dim, bool* built) {
  return with_tile<T>(head_dim, [&](auto tile) {
    const auto kernel = &stream_lse_kernel<T, tile()>;
    static const cudaFuncAttributes attributes = [](auto of) {
      cudaFuncAttributes known{};
      if (cudaFuncGetAttributes(&known, of) != cudaSuccess) (void)cudaGetLastError();
      return known;
    }(kernel);
    // Code for sm_80, also when it is compiled from PTX for a newer device, holds empty bodies.
    *built = attributes.ptxVersion >= 90;
    return cudaSuccess;
  });
}

template <class T>
cudaError_t launch_streams(const LsePass& lse, const ScorePass& score, int64_t items, cudaStream_t stream) {
  return with_tile<T>(lse.params.head_dim, [&](auto tile) {
    using Stream = KeyStream<T, tile()>;
    constexpr size_t kSums = TileSums<tile()>::kBytes;
    static_assert(Stream::kBytes + kSums + 7 * 1024 <= size_t{227} * 1024);
    const auto first = &stream_lse_kernel<T, tile()>;
    const auto second = &stream_scores_kernel<T, tile()>;
    for (const auto& [kernel, bytes] : {std::pair{reinterpret_cast<const void*>(first), Stream::kBytes},
                                        std::pair{reinterpret_cast<const void*>(second), Stream::kBytes + kSums}}) {
      if (const cudaError_t err = allow_shared_memory(kernel, bytes); err != cudaSuccess) return err;
    }
    const dim3 grid(static_cast<unsigned>(items));
    if (const cudaError_t err = launch_dependent(first, true, grid, Stream::kThreads, Stream::kBytes, stream, lse);
        err != cudaSuccess) {
      return err;
    }
    return launch_dependent(second, true, grid, Stream::kThreads, Stream::kBytes + kSums, stream, score);
  });
}

template <class T>
cudaError_t launch_vote_pass(const VotePass& pass, int64_t items, cudaStream_t stream) {
  return with_tile<T>(pass.params.head_dim, [&](auto tile) {
    using Tile = Tile<T, tile()>;
    static_assert(kMaxVoteQueries * (tile() * sizeof(T) + 8) + Tile::kKeyBytes <= kSmallestSharedMemory);
    const VoteTiles plan = VoteTiles::of(pass.params.group_size, pass.params.vote_window);
    const int32_t queries = round_up(plan.query_tiles * pass.params.group_size, 2) * kQueryTile;
    const size_t shared = queries * tile() * sizeof(T) + Tile::kKeyBytes;
    return launch(&vote_pass_kernel<T, tile()>, pass, dim3(static_cast<unsigned>(items)), shared, stream);
  });
}

}  // namespace uncomp::kernels
