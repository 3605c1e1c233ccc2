// SPDX-License-Identifier: Apache-2.0
// Every limit of the library, written once. Tests and Python read them from `_C`.
#pragma once

#include <cstdint>

namespace uncomp {

/// Largest channels per head of the attention operators; smaller head dims are zero-filled to a tile.
inline constexpr int kMaxHeadDim = 256;
/// Head dims of keys and values must be a multiple of this: 16-byte rows in half precision.
inline constexpr int kHeadDimMultiple = 8;
/// Head-dim tiles that the kernels are compiled for, ascending.
inline constexpr int kHeadDimTiles[] = {64, 128, 256};
/// Most stored numbers of a key that CUDA kernels make again; the CPU body takes kMaxHeadDim.
inline constexpr int kMaxLatentDim = 128;
/// Most query heads that share one KV head.
inline constexpr int kMaxGroupSize = 16;
/// Most queries of a score window (the last W queries of a prompt).
inline constexpr int kMaxWindow = 64;
/// Most vote rows of a slot (the last Wd decode queries).
inline constexpr int kMaxVoteWindow = 64;
/// Widest pooling, tokens; odd.
inline constexpr int kMaxPool = 129;
/// Most channels of a matrix whose spectrum the CUDA kernel computes; the CPU body has no limit.
inline constexpr int kMaxSpectrumDim = 256;
/// Most rows, and most groups, that share one budget: a whole model's rows of one sequence.
inline constexpr int kMaxBudgetRows = 16384;
/// Largest weight of a group in a budget.
inline constexpr int kMaxBudgetWeight = 1 << 20;
/// Most columns of a row of scores that tokens are selected from.
inline constexpr int kMaxSelectColumns = 1 << 30;
/// Most tensors that one gather_tokens call moves.
inline constexpr int kMaxGatherTensors = 8;

}  // namespace uncomp
