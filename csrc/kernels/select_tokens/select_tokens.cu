// SPDX-License-Identifier: Apache-2.0
// The launches of select_tokens: one kernel for all rows; where there are many rows, one before it that adds their
// lengths.
#include "kernels/select_tokens.h"

#include "kernels/common/dependent.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/runtime.h"
#include "kernels/select_tokens/row.cuh"

namespace uncomp::kernels {
namespace {

using namespace select_steps;

constexpr int kRowStartThreads = 1024;
constexpr int kOneLaunchRows = 256;  // up to here each block adds the lengths of all rows itself

/// row_start alone: one block adds the lengths in order.
__global__ void __launch_bounds__(kRowStartThreads)
    select_row_start_kernel(const __grid_constant__ SelectTokensParams p) {
  __shared__ int64_t sum[32];
  let_next_start();
  const int64_t total = p.total_keep;
  int64_t done = 0;
  for (int64_t base = 0; base < p.num_rows; base += kRowStartThreads) {
    const int64_t row = base + threadIdx.x;
    const bool live = row < p.num_rows;
    int64_t all = 0;
    const int64_t before =
        done + block_exclusive_sum<int64_t>(live ? load_row(p, static_cast<int32_t>(row)).keep : 0, sum, &all);
    if (live) p.row_start[row] = static_cast<int32_t>(min_of(before, total));
    done += all;
  }
  if (threadIdx.x == 0) p.row_start[p.num_rows] = static_cast<int32_t>(min_of(done, total));
}

using Kernel = void (*)(SelectTokensParams, SelectPlan, bool, uint4*);

Kernel kernel_of(const SelectPlan& plan) {
  if (!plan.cached) return select_tokens_kernel<kSelectBits, false>;
  return plan.bits == kSelectBits ? select_tokens_kernel<kSelectBits, true>
                                  : select_tokens_kernel<kSelectShortBits, true>;
}

/// The plan that the current device can run: fewer blocks a row where it cannot hold a cluster of that size.
cudaError_t plan_for_device(const SelectTokensParams& p, SelectPlan* plan) {
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  const bool border = reinterpret_cast<uintptr_t>(p.scores) % 16 == 0 && p.row_stride % 4 == 0;
  const int64_t width = int64_t{p.columns} + (border ? 0 : 3);
  int32_t blocks = select_blocks(p.num_rows, p.columns, info.sm_count);
  for (;; blocks /= 2) {
    *plan = select_plan(width, p.pool, info.smem_per_block, blocks);
    const void* kernel = reinterpret_cast<const void*>(kernel_of(*plan));
    if (const cudaError_t err = allow_shared_memory(kernel, static_cast<size_t>(plan->shared_bytes));
        err != cudaSuccess) {
      return err;
    }
    if (blocks == 1) return cudaSuccess;
    bool fits = false;
    if (const cudaError_t err =
            cluster_fits(kernel, blocks, plan->threads, static_cast<size_t>(plan->shared_bytes), &fits);
        err != cudaSuccess) {
      return err;
    }
    if (fits) return cudaSuccess;
  }
}

}  // namespace

cudaError_t select_tokens_workspace_bytes(const SelectTokensParams& params, int64_t* bytes) {
  SelectPlan plan{};
  const cudaError_t err = plan_for_device(params, &plan);
  *bytes = plan.cached ? 0 : params.num_rows * plan.covered() * static_cast<int64_t>(sizeof(uint32_t));
  return err;
}

cudaError_t select_tokens(const SelectTokensParams& params, void* workspace, cudaStream_t stream) {
  const bool one_launch = params.num_rows > 0 && params.num_rows <= kOneLaunchRows;
  if (!one_launch) {
    select_row_start_kernel<<<1, kRowStartThreads, 0, stream>>>(params);
    if (const cudaError_t err = cudaGetLastError(); err != cudaSuccess || params.num_rows == 0) return err;
  }
  SelectPlan plan{};
  if (const cudaError_t err = plan_for_device(params, &plan); err != cudaSuccess) return err;
  bool early = false;
  if (const cudaError_t err = compiled_for_sm_90(reinterpret_cast<const void*>(kernel_of(plan)), &early);
      err != cudaSuccess) {
    return err;
  }
  const dim3 grid(static_cast<unsigned>(params.num_rows) * static_cast<unsigned>(plan.blocks));
  return launch_kernel(
      {grid, plan.threads, static_cast<size_t>(plan.shared_bytes), stream, plan.blocks > 1 ? plan.blocks : 0, early},
      kernel_of(plan), params, plan, one_launch, static_cast<uint4*>(workspace));
}

}  // namespace uncomp::kernels
