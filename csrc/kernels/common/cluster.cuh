// SPDX-License-Identifier: Apache-2.0
// Blocks of a thread-block cluster (sm_90): barrier, and reads of another block's shared memory. Code compiled for an
// older architecture traps here; the host asks `cluster_fits` before it launches clusters.
#pragma once

#include <cstdint>

#include "kernels/common/mma.cuh"

namespace uncomp::kernels {

/// What this thread wrote before is visible to threads of the cluster that return from `cluster_wait`. Each arrive
/// needs one wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
#else
  __trap();
#endif
}

/// Barrier over all threads of all blocks of the cluster; a block barrier too.
__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

/// The word at the place of `p` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t cluster_read(const uint32_t* p, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote, value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];\n" : "=r"(value) : "r"(remote) : "memory");
  return value;
#else
  __trap();
  return 0 * rank * *p;
#endif
}

}  // namespace uncomp::kernels
