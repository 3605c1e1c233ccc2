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

/// Tells the cluster that this block runs, without any memory order. Its shared memory may be written by others once
/// they return from their `cluster_wait`.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory");
#else
  __trap();
#endif
}

/// A barrier of a block for `arrivals` arrivals; the cluster may use it after `cluster_arrive_relaxed` and a wait.
__device__ __forceinline__ void mail_init(uint64_t* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#else
  __trap();
#endif
}

/// Arrives at the own block's `barrier`, which will also wait for `bytes` of mail.
__device__ __forceinline__ void mail_expect(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

/// Arrives at the `barrier` of block `rank`. What this block wrote to its own shared memory before, other threads
/// before a block barrier, is visible to threads that return from `mail_wait` there; global writes may still be on
/// their way.
__device__ __forceinline__ void mail_arrive(uint64_t* barrier, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "fence.release.sync_restrict::shared::cta.cluster;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#else
  __trap();
#endif
}

/// Waits for the first phase of the own block's `barrier`; mail that it waited for is visible, and the shared memory of
/// the blocks that arrived.
__device__ __forceinline__ void mail_wait(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  }
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;\n" ::: "memory");
#else
  __trap();
#endif
}

/// Sends bytes to the place of `p` in block `rank`; its `barrier` counts them when they have arrived. No fence: mail
/// orders nothing but itself, so that global writes may still be on their way.
__device__ __forceinline__ void mail(uint64_t* p, uint32_t rank, uint64_t value, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 there, bar;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 bar, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [there], %3, [bar];\n}\n" ::"r"(shared_address(p)),
      "r"(shared_address(barrier)), "r"(rank), "l"(value)
      : "memory");
#else
  __trap();
#endif
}
/// The same for 16 bytes.
__device__ __forceinline__ void mail(uint4* p, uint32_t rank, uint4 value, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 there, bar;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 bar, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [bar];\n}\n" ::"r"(
          shared_address(p)),
      "r"(shared_address(barrier)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
#else
  __trap();
#endif
}

}  // namespace uncomp::kernels
