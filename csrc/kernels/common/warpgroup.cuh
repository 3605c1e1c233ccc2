// SPDX-License-Identifier: Apache-2.0
// Order around matrix instructions of a warpgroup (wgmma, sm_90a): they run behind the thread's back until waited for.
#pragma once

namespace uncomp::kernels {

/// Before the first matrix instruction that follows other uses of its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

/// Closes a group of matrix instructions.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

/// Waits until at most N groups are still in flight.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

/// Accumulators are touched behind this point only.
template <int N>
__device__ __forceinline__ void wgmma_settle(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

}  // namespace uncomp::kernels
