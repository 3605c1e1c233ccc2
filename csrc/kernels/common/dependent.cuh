// SPDX-License-Identifier: Apache-2.0
// Kernels that start while the one before them in the stream still runs (programmatic dependent launch, sm_90). Such a
// kernel touches no memory that others write before `wait_for_previous`.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
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
