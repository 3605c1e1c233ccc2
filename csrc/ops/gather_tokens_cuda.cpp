// SPDX-License-Identifier: Apache-2.0
// gather_tokens: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/lanes.h"
#include "kernels/gather_tokens.h"
#include "ops/check.h"
#include "ops/gather_tokens.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

std::vector<at::Tensor> gather_tokens_cuda(at::TensorList tensors, const at::Tensor& index) {
  check_gather_tokens(tensors, index);
  const CudaScope scope(index);
  kernels::GatherTokensParams params{};
  params.index = index.const_data_ptr<int32_t>();
  params.num_tensors = static_cast<int32_t>(tensors.size());
  params.batch = check_int32_size("gather_tokens", "sequences", index.size(0));
  params.num_wanted = check_int32_size("gather_tokens", "tokens of index", index.size(1));
  params.seq_len = static_cast<int32_t>(tensors[0].size(1));
  std::vector<at::Tensor> gathered;
  gathered.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = tensors[i];
    std::vector<int64_t> shape = t.sizes().vec();
    shape[0] = index.size(0);
    shape[1] = index.size(1);
    at::Tensor out = at::empty(shape, t.options());
    const int64_t count = index.numel();
    auto& source = params.source[i];
    source.from = static_cast<const char*>(t.const_data_ptr());
    source.to = static_cast<char*>(out.mutable_data_ptr());
    source.sequence_stride = t.size(0) == 1 ? 0 : t.stride(0) * t.element_size();
    source.token_stride = t.stride(1) * t.element_size();
    source.token_bytes = count == 0 ? 0 : static_cast<int32_t>(out.nbytes() / count);
    source.lane_bytes = common_lane_bytes(
        {reinterpret_cast<int64_t>(source.from), source.sequence_stride, source.token_stride, source.token_bytes});
    gathered.push_back(std::move(out));
  }
  check_launch("gather_tokens", kernels::gather_tokens(params, scope.stream()));
  return gathered;
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("gather_tokens", &gather_tokens_cuda); }

}  // namespace
}  // namespace uncomp
