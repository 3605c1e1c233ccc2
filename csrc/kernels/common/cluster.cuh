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

/// Writes to the place of `p` in the shared memory of block `rank` of the cluster; visible to those who return from a
/// `cluster_wait` that follows a later `cluster_arrive`.
__device__ __forceinline__ void cluster_write(float* p, float value, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;\n" ::"r"(remote), "f"(value) : "memory");
#else
  __trap();
  *p = value + static_cast<float>(rank);
#endif
}

/// The same for four numbers on a 16-byte border.
__device__ __forceinline__ void cluster_write(float* p, float4 value, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(remote), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
#else
  __trap();
  *p = value.x + static_cast<float>(rank);
#endif
}

/// Two words at the place of `p`, which has an 8-byte border, in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint2 cluster_read2(const uint2* p, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  uint2 value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];\n" : "=r"(value.x), "=r"(value.y) : "r"(remote) : "memory");
  return value;
#else
  __trap();
  return rank == 0 ? *p : uint2{};
#endif
}

/// Four words at the place of `p`, which has a 16-byte border, in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint4 cluster_read4(const uint4* p, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  uint4 value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(remote)
               : "memory");
  return value;
#else
  __trap();
  return rank == 0 ? *p : uint4{};
#endif
}

}  // namespace uncomp::kernels
