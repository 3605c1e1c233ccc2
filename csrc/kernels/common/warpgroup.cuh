// SPDX-License-Identifier: Apache-2.0
// What matrix instructions of a warpgroup (wgmma, sm_90a) have in common: their order, since they run behind the
// thread's back until waited for, and operands in shared memory. These are panels: rows of 64 half-precision numbers
// whose 16-byte chunks are XOR-swizzled by the row modulo 8, panels on 1024-byte borders.
#pragma once

#include <cstdint>

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

/// Operand whose rows are the M or N side and whose panels are cut along the summed side. Steps of 16 summed numbers
/// lie 32 bytes apart inside a panel.
__device__ __forceinline__ uint64_t rows_operand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32, kUnused = 1 << 16;
  return kSwizzle128 | kEightRows | kUnused | uint64_t{(address & 0x3ffff) >> 4};
}

/// Operand whose rows are the summed side; the next 64 columns lie `panel_bytes` further on. Steps of 16 summed numbers
/// lie 2048 bytes apart.
__device__ __forceinline__ uint64_t columns_operand(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | uint64_t{panel_bytes >> 4} << 16 | uint64_t{(address & 0x3ffff) >> 4};
}

/// `operand`, `bytes` further on.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

}  // namespace uncomp::kernels
