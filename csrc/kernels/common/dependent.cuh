// SPDX-License-Identifier: Apache-2.0
// Kernels that start while the one before them in the stream still runs (programmatic dependent launch, sm_90). Such a
// kernel touches no memory that others write before `wait_for_previous`.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/common/launch.cuh"

namespace uncomp::kernels {

/// Returns once all blocks of the kernel before have ended and their writes are visible. Every thread of a kernel that
/// is launched by `launch_dependent` calls it, those with nothing to do as well: what follows in the stream waits for
/// this kernel alone.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

/// Brings a kernel's parameters into the multiprocessor, a line a warp: each line would be waited for where it is first
/// needed, one after the other. Goes before `wait_for_previous`.
template <class Params>
__device__ __forceinline__ void fetch_parameters(const Params& params) {
#if __CUDA_ARCH__ >= 900
  constexpr uint32_t kWords = sizeof(Params) / 4, kLineWords = 16;
  for (uint32_t i = threadIdx.x / 32 * kLineWords; i < kWords; i += blockDim.x / 32 * kLineWords) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(&params)[i];
    // A condition that never holds keeps the read alive: as a pointer or stride the word would be odd, as a count
    // beyond all memory, as a float no number.
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0x7fa5c3e1;\n@p griddepcontrol.launch_dependents;\n}\n" ::"r"(word));
  }
#endif
}

/// Lets the next kernel of the stream start once all blocks of this one have called it.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

/// An ordinary launch, or with `early` one that may start before the kernel before it has ended. `early` must be false
/// for code of an architecture older than sm_90, which does not wait.
template <class... Params, class... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), bool early, dim3 grid, int threads, size_t shared_bytes,
                             cudaStream_t stream, Args&&... args) {
  return launch_kernel(
      {.grid = grid, .threads = threads, .shared_bytes = shared_bytes, .stream = stream, .early = early}, kernel,
      std::forward<Args>(args)...);
}

}  // namespace uncomp::kernels
