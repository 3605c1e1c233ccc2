// SPDX-License-Identifier: Apache-2.0
// What the kernel floor asks of the CUDA runtime once per device: properties, shared-memory limits, the error word.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace uncomp::kernels {

struct DeviceInfo {
  int32_t sm_count;
  int32_t capability;  // major * 10 + minor
  int64_t l2_bytes;
  int64_t smem_per_block;  // opt-in limit, bytes
};

/// Properties of the current device, read once.
cudaError_t device_info(DeviceInfo* info);

/// Lets `kernel` use `bytes` of dynamic shared memory on the current device; remembers what was granted.
cudaError_t allow_shared_memory(const void* kernel, size_t bytes);

/// Whether the current device can hold a cluster of `blocks` blocks of `kernel`: code compiled for sm_90 or later, and
/// room for one such cluster. Remembers the answer. Call `allow_shared_memory` first.
cudaError_t cluster_fits(const void* kernel, int32_t blocks, int32_t threads, size_t shared_bytes, bool* fits);

/// Clusters of `blocks` blocks of `kernel` that the current device holds at a time, 0 where it knows no clusters.
/// Remembers the answer, and lets the kernel have clusters of more than 8 blocks. Call `allow_shared_memory` first.
cudaError_t active_clusters(const void* kernel, int32_t blocks, int32_t threads, size_t shared_bytes, int32_t* count);

/// Whether the current device runs code of `kernel` that was compiled for sm_90 or later. Remembers the answer.
cudaError_t compiled_for_sm_90(const void* kernel, bool* yes);

/// Lets `kernel` run in clusters of more than 8 blocks where the device can (sm_90); remembers that.
cudaError_t allow_large_clusters(const void* kernel);

/// The current device's error word: int32, 0 while all is well. Allocated on first use, which must not fall into
/// a stream capture; `warmup` makes sure.
cudaError_t error_word(int32_t** word);

/// Reads and clears the error word of the current device. Synchronises the device.
cudaError_t take_error(int32_t* code);

/// Does everything that must happen before the first capture on the current device.
cudaError_t warmup();

}  // namespace uncomp::kernels
