// SPDX-License-Identifier: Apache-2.0
// Instances of the tensor-core kernels for __half.
#include "kernels/window_scores/half_launch.cuh"

namespace uncomp::kernels {

template cudaError_t launch_lse_pass<__half>(const LsePass&, int64_t, cudaStream_t);
template cudaError_t launch_score_pass<__half>(const ScorePass&, int64_t, cudaStream_t);
template cudaError_t streams_built<__half>(int32_t, bool*);
template cudaError_t launch_streams<__half>(const LsePass&, const ScorePass&, int64_t, cudaStream_t);
template cudaError_t launch_vote_pass<__half>(const VotePass&, int64_t, cudaStream_t);

}  // namespace uncomp::kernels
