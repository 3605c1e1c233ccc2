// SPDX-License-Identifier: Apache-2.0
// Device guard and current stream through c10's virtual guard, so that no CUDA header of torch is needed and a
// CPU-only torch builds the same code.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime_api.h>

namespace uncomp {

/// Makes the tensor's device current for its lifetime and holds that device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const at::Tensor& t)
      : guard_(t.device()),
        stream_(static_cast<cudaStream_t>(
            c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).native_handle())) {}

  cudaStream_t stream() const { return stream_; }

 private:
  c10::OptionalDeviceGuard guard_;
  cudaStream_t stream_;
};

/// Turns a failed launch into an exception that names the operator.
inline void check_launch(const char* op, cudaError_t err) {
  TORCH_CHECK(err == cudaSuccess, "uncomp::", op, ": CUDA error ", cudaGetErrorName(err), ": ",
              cudaGetErrorString(err));
}

/// Workspace from torch's allocator, so graphs and memory statistics see it. 256-byte aligned.
at::Tensor workspace(const at::Tensor& like, int64_t bytes);

}  // namespace uncomp
