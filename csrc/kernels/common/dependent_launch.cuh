// SPDX-License-Identifier: Apache-2.0
// A kernel that starts while the one before it still runs (sm_90). Older devices run one after the other, and both
// calls do nothing.
#pragma once

namespace uncomp::kernels {

/// Lets the kernel behind this one start as soon as every block has called this or ended.
__device__ __forceinline__ void start_dependent_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

/// Waits until the kernel before has ended; what it wrote is visible afterwards.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace uncomp::kernels
