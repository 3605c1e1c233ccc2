// SPDX-License-Identifier: Apache-2.0
// select_tokens: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/select_tokens.h"
#include "ops/check.h"
#include "ops/select_tokens.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

std::tuple<at::Tensor, at::Tensor> select_tokens_cuda(const at::Tensor& scores, const at::Tensor& length,
                                                      const at::Tensor& keep_len, int64_t total_keep, int64_t sink,
                                                      int64_t window, int64_t pool, std::string_view pool_mode) {
  const Pool mode = check_select_tokens(scores, length, keep_len, total_keep, sink, window, pool, pool_mode);
  const CudaScope scope(scores);
  at::Tensor index = at::empty({total_keep}, length.options());
  at::Tensor row_start = at::empty({scores.size(0) + 1}, length.options());
  kernels::SelectTokensParams params{};
  params.scores = scores.const_data_ptr<float>();
  params.length = length.const_data_ptr<int32_t>();
  params.keep_len = keep_len.const_data_ptr<int32_t>();
  params.index = index.mutable_data_ptr<int32_t>();
  params.row_start = row_start.mutable_data_ptr<int32_t>();
  params.row_stride = scores.stride(0);
  params.num_rows = static_cast<int32_t>(scores.size(0));
  params.columns = static_cast<int32_t>(scores.size(1));
  params.total_keep = static_cast<int32_t>(total_keep);
  params.sink = static_cast<int32_t>(std::min(sink, scores.size(1)));
  params.window = static_cast<int32_t>(std::min(window, scores.size(1)));
  params.pool = static_cast<int32_t>(pool);
  params.pool_mode = mode;
  int64_t bytes = 0;
  check_launch("select_tokens", kernels::select_tokens_workspace_bytes(params, &bytes));
  const at::Tensor keys = workspace(scores, bytes);
  check_launch("select_tokens", kernels::select_tokens(params, keys.mutable_data_ptr(), scope.stream()));
  return {index, row_start};
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("select_tokens", &select_tokens_cuda); }

}  // namespace
}  // namespace uncomp
