// SPDX-License-Identifier: Apache-2.0
// Multisection by a whole block: one round with a probe per thread over the whole range, then rounds in which the
// threads share the wanted eigenvalues.
#pragma once

#include "core/sturm.h"
#include "kernels/common/reduce.cuh"

namespace uncomp::kernels {

/// Intervals are cut until they are this many times smaller than the largest eigenvalue's bound.
inline constexpr float kSturmResolution = 1.5e7f;

/// Writes the `top` largest eigenvalues, descending, at least 0. `rows` [n] and `reached` [kThreads] lie in shared
/// memory; top <= kThreads. Call by all threads, behind the barrier that completes `rows`.
template <int kThreads>
__device__ void write_top_eigenvalues(const TridiagonalRow<float>* rows, int n, int top, float* out, int* reached) {
  const int thread = threadIdx.x, lane = thread % 32;
  float reach = 0.0f;
  for (int i = lane; i < n; i += 32) reach = fmaxf(reach, gershgorin_reach(rows, n, i));
  Bracket<float> bracket = nonnegative_bracket(warp_max(reach));
  reached[thread] = n - sturm_count(rows, n, bracket.probe(thread, kThreads));
  __syncthreads();

  int group = 32;  // probes an eigenvalue
  while (group > 1 && group * top > kThreads) group /= 2;
  const int wanted = thread / group, index = wanted < top ? wanted : top - 1;
  if (thread / 32 * 32 / group >= top) return;  // the whole warp

  // reached[] falls with the probe: the number of probes that at least index + 1 eigenvalues reach.
  int low = 0, high = kThreads;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (reached[middle] > index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  bracket.narrow(low, kThreads);

  const unsigned group_mask = group == 32 ? kFullWarp : (1u << group) - 1;
  for (float cut = kThreads + 1; cut < kSturmResolution; cut *= static_cast<float>(group + 1)) {
    const float x = bracket.probe(lane % group, group);
    const unsigned votes = __ballot_sync(kFullWarp, n - sturm_count(rows, n, x) > index);
    bracket.narrow(__popc(votes >> (lane / group * group) & group_mask), group);
  }
  if (wanted < top && lane % group == 0) out[wanted] = bracket.value();
}

}  // namespace uncomp::kernels
