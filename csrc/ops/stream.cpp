// SPDX-License-Identifier: Apache-2.0
// Workspace allocation of the CUDA bodies.
#include "ops/stream.h"

#include <ATen/ops/empty.h>

namespace uncomp {

at::Tensor workspace(const at::Tensor& like, int64_t bytes) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

}  // namespace uncomp
