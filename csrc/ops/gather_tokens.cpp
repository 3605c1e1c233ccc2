// SPDX-License-Identifier: Apache-2.0
// gather_tokens: checks, the C++ entry and the CPU body.
#include "ops/gather_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "ops/call.h"
#include "ops/check.h"
#include "ops/threads.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "gather_tokens";

}  // namespace

std::vector<at::Tensor> gather_tokens(at::TensorList tensors, const at::Tensor& index) {
  static const auto op = op_handle<std::vector<at::Tensor>(at::TensorList, const at::Tensor&)>("uncomp::gather_tokens");
  return op.call(tensors, index);
}

void check_gather_tokens(at::TensorList tensors, const at::Tensor& index) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  UNCOMP_CHECK_VALUE(kOp, count >= 1 && count <= kMaxGatherTensors, "tensors must hold 1 to ", kMaxGatherTensors,
                     " tensors; got ", count);
  check_dtype(kOp, "index", index, at::kInt);
  check_rank(kOp, "index", index, 2, "[B, N]");
  check_contiguous(kOp, "index", index);
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor& t = tensors[i];
    const std::string name = c10::str("tensors[", i, "]");
    check_device(kOp, name.c_str(), t, "index", index);
    UNCOMP_CHECK_VALUE(kOp, t.dim() >= 2, name, " must have shape [B or 1, S, ...]; got ", t.sizes());
    UNCOMP_CHECK_VALUE(kOp, t.size(0) == index.size(0) || t.size(0) == 1, name, " must have ", index.size(0),
                       " sequences like index, or 1; got ", t.size(0));
    UNCOMP_CHECK_VALUE(kOp, t.size(1) == tensors[0].size(1), name, " must have ", tensors[0].size(1),
                       " tokens like tensors[0]; got ", t.size(1));
    int64_t inner = 1;
    for (int64_t d = t.dim() - 1; d >= 2; --d) {
      UNCOMP_CHECK_VALUE(kOp, t.size(d) <= 1 || t.stride(d) == inner, name,
                         " must be contiguous behind its token dimension; got strides ", t.strides());
      inner *= t.size(d);
    }
    check_int32_size(kOp, "a token in bytes", inner * t.element_size());
  }
  check_int32_size(kOp, "tokens", tensors[0].size(1));
}

namespace {

std::vector<at::Tensor> gather_tokens_cpu(at::TensorList tensors, const at::Tensor& index) {
  check_gather_tokens(tensors, index);
  const int64_t batch = index.size(0), wanted = index.size(1), seq_len = tensors[0].size(1);
  const int32_t* token = index.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < batch * wanted; ++i) {
    UNCOMP_CHECK_VALUE(kOp, token[i] >= -1 && token[i] < seq_len, "index must lie in [-1, ", seq_len, "); got ",
                       token[i]);
  }
  std::vector<at::Tensor> gathered;
  gathered.reserve(tensors.size());
  for (const at::Tensor& t : tensors) {
    std::vector<int64_t> shape = t.sizes().vec();
    shape[0] = batch;
    shape[1] = wanted;
    at::Tensor out = at::empty(shape, t.options());
    const int64_t bytes = batch * wanted == 0 ? 0 : out.nbytes() / (batch * wanted);
    if (bytes > 0) {
      const char* from = static_cast<const char*>(t.const_data_ptr());
      char* to = static_cast<char*>(out.mutable_data_ptr());
      const int64_t sequence_stride = t.size(0) == 1 ? 0 : t.stride(0) * t.element_size();
      const int64_t token_stride = t.stride(1) * t.element_size();
      const int64_t each = std::max<int64_t>(1, 65536 / bytes), tasks = ceil_div(batch * wanted, each);
      share(tasks, threads_for(out.numel()), [&](int64_t task, int64_t) {
        for (int64_t i = task * each; i < std::min((task + 1) * each, batch * wanted); ++i) {
          if (token[i] < 0) {
            std::memset(to + i * bytes, 0, bytes);
          } else {
            std::memcpy(to + i * bytes, from + i / wanted * sequence_stride + token[i] * token_stride, bytes);
          }
        }
      });
    }
    gathered.push_back(std::move(out));
  }
  return gathered;
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("gather_tokens", &gather_tokens_cpu); }

}  // namespace
}  // namespace uncomp
