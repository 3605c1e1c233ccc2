// SPDX-License-Identifier: Apache-2.0
// Launches with attributes: clusters of blocks, and kernels that start early.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace uncomp::kernels {

struct LaunchShape {
  dim3 grid;
  int threads;  // of a block
  size_t shared_bytes;
  cudaStream_t stream;
  int cluster = 0;     // neighbouring blocks that form a cluster; 0 says nothing about clusters
  bool early = false;  // may start before the kernel before has ended: see dependent.cuh
};

inline cudaLaunchAttribute cluster_attribute(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  return attribute;
}

inline cudaLaunchAttribute early_attribute() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

template <class... Params, class... Args>
cudaError_t launch_kernel(const LaunchShape& shape, void (*kernel)(Params...), Args&&... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  if (shape.cluster > 0) attributes[config.numAttrs++] = cluster_attribute(shape.cluster);
  if (shape.early) attributes[config.numAttrs++] = early_attribute();
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace uncomp::kernels
