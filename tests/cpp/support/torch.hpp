// SPDX-License-Identifier: Apache-2.0
// Devices on which the op floor's tests run.
#pragma once

#include <ATen/Context.h>

#include <vector>

namespace uncomp::test {

/// The CPU, and the first GPU where kernels were built and one is present.
inline std::vector<at::Device> devices() {
  std::vector<at::Device> all{at::Device(at::kCPU)};
#if UNCOMP_WITH_CUDA
  if (at::globalContext().hasCUDA()) all.emplace_back(at::kCUDA, 0);
#endif
  return all;
}

}  // namespace uncomp::test
