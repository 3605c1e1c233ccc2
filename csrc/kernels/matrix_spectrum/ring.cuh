// SPDX-License-Identifier: Apache-2.0
// A ring of tiles in shared memory between warps that copy and warps that compute (sm_90): barriers that count
// arrivals, copies that arrive when they have landed, and launches that start before the one they follow has ended.
#pragma once

#include <cstdint>

namespace uncomp::kernels {

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

/// Waits for the end of the barrier's phase `parity`; a fresh barrier has ended phase 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/// 16 bytes to the shared address; `live` false writes zeros and reads nothing.
__device__ __forceinline__ void ring_copy16(uint32_t shared, const void* global, bool live) {
  const int bytes = live ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

/// This thread arrives when all of its copies so far have landed.
__device__ __forceinline__ void ring_copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}

}  // namespace uncomp::kernels
