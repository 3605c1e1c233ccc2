// SPDX-License-Identifier: Apache-2.0
// seed_votes_: runs of slots and the launch of the dtype's kernel.
#include "kernels/window_scores/seed_votes.h"

#include "core/dispatch.h"
#include "kernels/common/types.cuh"
#include "kernels/runtime.h"
#include "kernels/window_scores/passes.h"

namespace uncomp::kernels {

cudaError_t seed_votes(const SeedVotesParams& params, cudaStream_t stream) {
  DeviceInfo device{};
  if (const cudaError_t err = device_info(&device); err != cudaSuccess) return err;
  const int32_t tile = head_dim_tile(params.head_dim);
  if (tile == 0 || !params.rows.in_arena()) return cudaErrorInvalidValue;
  const int32_t run = run_tokens(params.rows.arena.capacity, tile, 4 * device.sm_count);
  const VotePass pass{params, {params.rows, params.num_rows, run}};
  const int64_t items = pass.runs.items();
  if (items == 0) return cudaSuccess;
  if (items > 2147483647) return cudaErrorInvalidConfiguration;
  cudaError_t err = cudaErrorInvalidValue;
  dispatch_dtype(params.dtype,
                 [&](auto tag) { err = launch_vote_pass<typename decltype(tag)::type>(pass, items, stream); });
  return err;
}

}  // namespace uncomp::kernels
