// SPDX-License-Identifier: Apache-2.0
// Launches of one dtype's kernels; between the files of this folder only.
#pragma once

#include <vector_types.h>

#include "core/stream_plan.h"
#include "kernels/window_scores/seed_votes.h"
#include "kernels/window_scores/window_scores.h"

namespace uncomp::kernels {

/// Pass 1: one block a (run, chunk of queries).
struct LsePass {
  WindowScoresParams params;
  RowRuns runs;
  float2* partial;  // [items, g * W] (max, total) in powers of two
  StreamPlan plan;  // sm_90a
};

/// Pass 2: one block a (row, run of columns). On sm_90a one block a run of keys, as in pass 1.
struct ScorePass {
  WindowScoresParams params;
  int32_t run;  // columns
  RowRuns runs;
  const float2* partial;  // of pass 1, for sm_90a
  StreamPlan plan;        // sm_90a
};

/// Votes: one block a run of slots.
struct VotePass {
  SeedVotesParams params;
  RowRuns runs;
};

template <class T>
cudaError_t launch_lse_pass(const LsePass& pass, int64_t items, cudaStream_t stream);
template <class T>
cudaError_t launch_score_pass(const ScorePass& pass, int64_t items, cudaStream_t stream);
/// Whether this program holds the kernels of both passes for sm_90a.
template <class T>
cudaError_t streams_built(int32_t head_dim, bool* built);
/// Both passes on sm_90a; the second starts before the first has ended and merges its partial results itself.
template <class T>
cudaError_t launch_streams(const LsePass& lse, const ScorePass& score, int64_t items, cudaStream_t stream);
template <class T>
cudaError_t launch_vote_pass(const VotePass& pass, int64_t items, cudaStream_t stream);

}  // namespace uncomp::kernels
