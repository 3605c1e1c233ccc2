// SPDX-License-Identifier: Apache-2.0
// All operator schemas on one page. Order of arguments: data, layout, sizes, floats, options. `Tensor(a!)` marks what
// an operator changes; an operator that changes its arguments returns only new tensors.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <vector>

#include "bindings/op_names.h"

namespace {

/// Operators are for inference: a call that would have to be differentiated, backward or forward, is refused instead of
/// giving silently wrong derivatives. Tangents count under torch.no_grad() too, as torch itself has it.
void inference_only(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  const bool backward = at::GradMode::is_enabled();
  const auto refuse = [&](const at::Tensor& t, size_t i, const auto&... place) {
    TORCH_CHECK_NOT_IMPLEMENTED(!(backward && t.requires_grad()), op.schema().name(), ": inference only; ",
                                arguments[i].name(), place..., " requires a gradient, call inside torch.no_grad()");
    TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(/*level=*/0).defined(), op.schema().name(), ": inference only; ",
                                arguments[i].name(), place...,
                                " has a forward-mode tangent, call with its primal (torch.autograd.forward_ad)");
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    if (value.isTensor()) refuse(value.toTensor(), i);
    if (value.isTensorList()) {
      const at::ArrayRef<c10::IValue> list = value.toListRef();
      for (size_t k = 0; k < list.size(); ++k) refuse(list[k].toTensor(), i, "[", k, "]");
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

/// What an operator wrote is a new version of the tensor, so that autograd, which may have saved it, does not use it
/// unawares. Inference tensors count no versions.
void count_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      written.push_back(torch::jit::peek(*stack, i, arguments.size()).toTensor());
    }
  }
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  for (const at::Tensor& t : written) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

/// torch would materialise such a view, run the operator on the copy and lose what it writes.
void no_negated_views(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_VALUE(false, op.schema().name(), ": a tensor is a lazily negated view; call .resolve_neg() on it first");
}

#if !UNCOMP_WITH_CUDA
void no_cuda_kernels(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": this build of uncomp has no CUDA kernels; install nvcc and build again with "
                              "UNCOMP_CUDA=on");
}
#endif

}  // namespace

TORCH_LIBRARY(uncomp, m) {
  m.def("matrix_spectrum(Tensor states, Tensor? first, Tensor? length, int top) -> Tensor");
  m.def("matrix_entropy(Tensor spectrum, int top, int dim, str kind=\"truncated\") -> (Tensor entropy, Tensor erank)");
  m.def("group_heads(Tensor entropy, int num_groups, str order=\"ascending\") -> (Tensor group, Tensor rank)");
  m.def("allocate_budget(Tensor group, Tensor weight, Tensor length, Tensor total, int floor) -> Tensor");
  m.def(
      "window_scores(Tensor query, Tensor key, Tensor? value, Tensor? first, Tensor? length, Tensor? row_start, "
      "Tensor? row_len, int columns, float scale, str reduce_window=\"sum\", str reduce_group=\"mean\") -> (Tensor "
      "scores, Tensor lse)");
  m.def(
      "seed_votes_(Tensor query, Tensor lse, Tensor query_position, Tensor key_rows, Tensor slot_position, Tensor "
      "row_start, Tensor row_len, Tensor(a!) votes, Tensor(b!) vote_sum, Tensor(c!) vote_step, Tensor(d!) order, float "
      "scale, str reduce_group=\"mean\") -> ()");
  m.def(
      "select_tokens(Tensor scores, Tensor length, Tensor keep_len, int total_keep, int sink, int window, int pool, "
      "str "
      "pool_mode=\"max\") -> (Tensor index, Tensor row_start)");
  m.def(
      "compact_kv(Tensor key, Tensor value, Tensor? position, Tensor? first, Tensor? source_start, Tensor index, "
      "Tensor "
      "index_start, Tensor row_start, int capacity) -> (Tensor key_rows, Tensor value_rows, Tensor slot_position, "
      "Tensor row_len)");
  m.def(
      "append_kv_(Tensor key, Tensor value, Tensor position, Tensor? first, Tensor? length, Tensor row_start, "
      "Tensor(a!) row_len, Tensor(b!) key_rows, Tensor(c!) value_rows, Tensor(d!) slot_position) -> ()");
  m.def(
      "decode_attention(Tensor query, Tensor key_rows, Tensor value_rows, Tensor row_start, Tensor row_len, float "
      "scale, Tensor? key_basis=None, Tensor? key_bias=None, Tensor? key_norm=None, float key_norm_eps=0., Tensor? "
      "rotary_frequency=None, float rotary_scale=1., Tensor? slot_position=None, Tensor? position_offset=None) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "decode_evict_(Tensor query, Tensor key, Tensor value, Tensor position, Tensor row_start, Tensor(a!) row_len, "
      "Tensor(b!) key_rows, Tensor(c!) value_rows, Tensor(d!) slot_position, Tensor(e!) votes, Tensor(f!) vote_sum, "
      "Tensor(g!) vote_step, Tensor(h!) order, int window, int sink, int pool, float scale, str pool_mode=\"max\", str "
      "reduce_group=\"mean\", Tensor? key_basis=None, Tensor? key_bias=None, Tensor? key_norm=None, float "
      "key_norm_eps=0., Tensor? rotary_frequency=None, float rotary_scale=1., Tensor? position_offset=None) -> (Tensor "
      "out, Tensor lse)");
  m.def(
      "ragged_attention(Tensor query, Tensor? key, Tensor? value, Tensor? other_out, Tensor? other_lse, Tensor? first, "
      "Tensor? length, Tensor key_rows, Tensor value_rows, Tensor row_start, Tensor row_len, float scale) -> (Tensor "
      "out, Tensor lse)");
  m.def("gather_tokens(Tensor[] tensors, Tensor index) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(uncomp, Autograd, m) {
  for (const char* op : uncomp::kOpNames) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&inference_only>());
}

TORCH_LIBRARY_IMPL(uncomp, ADInplaceOrView, m) {
  for (const char* op : uncomp::kOpNames) {
    if (std::string_view(op).ends_with('_')) {
      m.impl(op, torch::CppFunction::makeFromBoxedFunction<&count_versions>());
    }
  }
}

TORCH_LIBRARY_IMPL(uncomp, Negative, m) {
  for (const char* op : uncomp::kOpNames) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&no_negated_views>());
}

#if !UNCOMP_WITH_CUDA
TORCH_LIBRARY_IMPL(uncomp, CUDA, m) {
  for (const char* op : uncomp::kOpNames) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&no_cuda_kernels>());
}
#endif
