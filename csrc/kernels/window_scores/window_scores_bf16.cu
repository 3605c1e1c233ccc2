// SPDX-License-Identifier: Apache-2.0
// Instances of the tensor-core kernels for __nv_bfloat16.
#include "kernels/window_scores/half_launch.cuh"

namespace uncomp::kernels {

template cudaError_t launch_lse_pass<__nv_bfloat16>(const LsePass&, int64_t, cudaStream_t);
template cudaError_t launch_score_pass<__nv_bfloat16>(const ScorePass&, int64_t, cudaStream_t);
template cudaError_t streams_built<__nv_bfloat16>(int32_t, bool*);
template cudaError_t launch_streams<__nv_bfloat16>(const LsePass&, const ScorePass&, int64_t, cudaStream_t);
template cudaError_t launch_vote_pass<__nv_bfloat16>(const VotePass&, int64_t, cudaStream_t);

}  // namespace uncomp::kernels
