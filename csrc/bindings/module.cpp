// SPDX-License-Identifier: Apache-2.0
// The Python door: every operator with argument names and docstring, what this build can do, and its limits.
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <vector>

#include "bindings/op_names.h"
#include "core/constants.h"
#include "ops/allocate_budget.h"
#include "ops/append_kv.h"
#include "ops/compact_kv.h"
#include "ops/decode_attention.h"
#include "ops/decode_evict.h"
#include "ops/device.h"
#include "ops/gather_tokens.h"
#include "ops/group_heads.h"
#include "ops/matrix_entropy.h"
#include "ops/matrix_spectrum.h"
#include "ops/ragged_attention.h"
#include "ops/seed_votes.h"
#include "ops/select_tokens.h"
#include "ops/window_scores.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = UNCOMP_VERSION;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = static_cast<bool>(UNCOMP_WITH_CUDA);
  info["cuda_version"] = UNCOMP_CUDA_VERSION;
  info["cuda_archs"] = UNCOMP_CUDA_ARCHS;
  info["head_dims"] = std::vector<int>(std::begin(uncomp::kHeadDimTiles), std::end(uncomp::kHeadDimTiles));
  info["cxx_standard"] = __cplusplus / 100 % 100;
  return info;
}

std::map<std::string, int> limits() {
  return {
      {"max_head_dim", uncomp::kMaxHeadDim},
      {"head_dim_multiple", uncomp::kHeadDimMultiple},
      {"max_latent_dim", uncomp::kMaxLatentDim},
      {"max_group_size", uncomp::kMaxGroupSize},
      {"max_window", uncomp::kMaxWindow},
      {"max_vote_window", uncomp::kMaxVoteWindow},
      {"max_pool", uncomp::kMaxPool},
      {"max_spectrum_dim", uncomp::kMaxSpectrumDim},
      {"max_gather_tensors", uncomp::kMaxGatherTensors},
      {"max_budget_rows", uncomp::kMaxBudgetRows},
      {"max_budget_weight", uncomp::kMaxBudgetWeight},
      {"max_select_columns", uncomp::kMaxSelectColumns},
  };
}

/// Not named `bind`: argument-dependent lookup would prefer std::bind and drop the definition in silence.
/// Exceptions of torch reach Python as the kinds they stand for, and the interpreter lock is free meanwhile.
template <class F, class... Extra>
void expose(py::module_& m, const char* name, F&& f, const Extra&... extra) {
  m.def(name, torch::wrap_pybind_function_no_gil(std::forward<F>(f)), extra...);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of uncomp. The same operators are torch.ops.uncomp.*; uncomp.ops has typed functions.";
  m.def("build_info", &build_info,
        "Version, torch version it was built with, CUDA yes or no, CUDA architectures, head-dim tiles.");
  m.def("limits", &limits, "Every limit of csrc/core/constants.h by name.");
  m.def(
      "op_names", [] { return std::vector<std::string>(std::begin(uncomp::kOpNames), std::end(uncomp::kOpNames)); },
      "Names of all operators, in the order of the method.");
  expose(m, "warmup", &uncomp::warmup_device, py::arg("device_index"),
         "Does what must happen on a CUDA device before the first graph capture.");
  expose(m, "take_device_error", &uncomp::take_device_error, py::arg("device_index"),
         "First violation noted by a kernel since the last call, as one line; empty when there is none. Synchronises.");

  // ---- matrix_spectrum
  expose(m, "matrix_spectrum", &uncomp::matrix_spectrum, py::arg("states"), py::arg("first") = py::none(),
         py::arg("length") = py::none(), py::arg("top"),
         R"doc(Largest eigenvalues of the trace-one token covariance of every head, descending.

Args:
    states: [B, H, S, D] float32, float16 or bfloat16, on CPU also float64; any strides with D contiguous.
    first: [B] int32, first real token; default 0.
    length: [B] int32, real tokens; default all that follow `first`.
    top: eigenvalues wanted, 1 to D.
Returns:
    [B, H, top] float32 (float64 for float64 states), shares of the trace.
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/matrix_spectrum.h.)doc");
  // ---- matrix_entropy
  expose(m, "matrix_entropy", &uncomp::matrix_entropy, py::arg("spectrum"), py::arg("top"), py::arg("dim"),
         py::arg("kind") = "truncated",
         R"doc(Truncated matrix entropy and effective rank of spectra.

Args:
    spectrum: [..., N] float32 or float64, contiguous, eigenvalues descending, shares of the trace.
    top: eigenvalues k that enter, 1 to N.
    dim: D of the states; the divisor is ln D for every k.
    kind: "truncated", "renormalized" or "renyi2" (needs all D eigenvalues).
Returns:
    entropy [...] = H_k / ln D and erank [...] = exp(H_k).
Raises:
    TypeError, ValueError: see csrc/ops/matrix_entropy.h.)doc");
  // ---- group_heads
  expose(m, "group_heads", &uncomp::group_heads, py::arg("entropy"), py::arg("num_groups"),
         py::arg("order") = "ascending",
         R"doc(Rank rows by entropy and cut the ranking into groups of fixed sizes.

Args:
    entropy: [N, H] float32, one ranking per N; ties to the lower row, NaN last.
    num_groups: 1 to H.
    order: "ascending" (group 0 = lowest entropy) or "reverse" (group ids turned round).
Returns:
    group [N, H] int32 and rank [N, H] int32.
Raises:
    TypeError, ValueError: see csrc/ops/group_heads.h.)doc");

  // ---- allocate_budget
  expose(m, "allocate_budget", &uncomp::allocate_budget, py::arg("group"), py::arg("weight"), py::arg("length"),
         py::arg("total"), py::arg("floor"),
         R"doc(Token limit of every row; the limits of a sequence sum to its total exactly.

Args:
    group: [N, H] int32, group of each row.
    weight: [G] or [N, G] int32, positive weight of each group.
    length: [N] int32, tokens of the sequence that reach the layer.
    total: [N] int32, tokens that the rows of the sequence share.
    floor: tokens that every row keeps in any case (window and sinks).
Returns:
    [N, H] int32 limits.
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/allocate_budget.h.)doc");

  // ---- window_scores
  expose(m, "window_scores", &uncomp::window_scores, py::arg("query"), py::arg("key"), py::arg("value") = py::none(),
         py::arg("first") = py::none(), py::arg("length") = py::none(), py::arg("row_start") = py::none(),
         py::arg("row_len") = py::none(), py::arg("columns") = 0, py::arg("scale"), py::arg("reduce_window") = "sum",
         py::arg("reduce_group") = "mean",
         R"doc(Attention mass that the last W queries put on every key, reduced over the window and the query group.

Args:
    query: [B, Hq, W, D] the last W queries, rotated.
    key: [B, Hkv, S, D] dense keys, or [C, D] an arena whose rows lie in position order.
    value: layout of key; multiplies each score by the norm of the token's value.
    first, length: [B] int32, real tokens of a dense prompt.
    row_start, row_len: [R + 1] and [R] int32, rows of an arena.
    columns: width of the result for an arena, 0 for dense keys.
    scale: factor of the logits.
    reduce_window: "sum" or "mean".
    reduce_group: "mean", "sum", "max", or "none" for one row per query head.
Returns:
    scores [R, S or columns] float32 and lse [B, Hq, W] float32 (natural log).
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/window_scores.h.)doc");
  // ---- seed_votes_
  expose(m, "seed_votes_", &uncomp::seed_votes_, py::arg("query"), py::arg("lse"), py::arg("query_position"),
         py::arg("key_rows"), py::arg("slot_position"), py::arg("row_start"), py::arg("row_len"), py::arg("votes"),
         py::arg("vote_sum"), py::arg("vote_step"), py::arg("order"), py::arg("scale"),
         py::arg("reduce_group") = "mean",
         R"doc(Fill the vote state of a freshly packed arena from the last Wd prompt queries.

Args:
    query: [B, Hq, W, D] the last W queries; the newest Wd of them vote.
    lse: [B, Hq, W] float32 of window_scores.
    query_position: [B, W] int32 original positions; -1 where a query does not exist.
    key_rows: [C, D] arena. slot_position: [C] int32. row_start: [R + 1], row_len: [R] int32.
    votes: [Wd, C] int32, vote_sum: [C] int32, vote_step: [R] int32, order: [C] int32; overwritten.
    scale: factor of the logits.
    reduce_group: "mean", "sum" (stored as the mean) or "max".
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/seed_votes.h.)doc");
  // ---- select_tokens
  expose(m, "select_tokens", &uncomp::select_tokens, py::arg("scores"), py::arg("length"), py::arg("keep_len"),
         py::arg("total_keep"), py::arg("sink"), py::arg("window"), py::arg("pool") = 1, py::arg("pool_mode") = "max",
         R"doc(Choose, for every row, the tokens that stay: sinks, window, and the best pooled scores.

Args:
    scores: [R, S] float32, larger means keep; NaN is the smallest.
    length: [R] int32, tokens of the row.
    keep_len: [R] int32, tokens to keep, clamped to [min(sink + window, n), n].
    total_keep: sum of the clamped keep_len; sizes the result.
    sink, window: first and last tokens that stay in any case.
    pool, pool_mode: odd width, "max" or "avg".
Returns:
    index [total_keep] int32, ascending inside a row, and row_start [R + 1] int32.
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/select_tokens.h.)doc");

  // ---- compact_kv
  expose(m, "compact_kv", &uncomp::compact_kv, py::arg("key"), py::arg("value"), py::arg("position"), py::arg("first"),
         py::arg("source_start"), py::arg("index"), py::arg("index_start"), py::arg("row_start"), py::arg("capacity"),
         R"doc(Pack chosen tokens of dense K and V, or of another arena, into the rows of a new arena.

Args:
    key, value: [B, Hkv, S, D] dense, any strides with D contiguous, or [C0, D] arenas.
    position: [B, S] int32 original positions or None; [C0] of an arena.
    first: [B] int32, first real token of a dense prompt, or None.
    source_start: [R + 1] int32 slots of the source arena; None where key is dense.
    index: [total] int32 tokens to keep, counted from first or from the row's start.
    index_start: [R + 1] int32, where each row's entries begin.
    row_start: [R + 1] int32 slots of the new arena.
    capacity: slots C of the new arena.
Returns:
    key_rows [C, Dk], value_rows [C, Dv], slot_position [C] int32, row_len [R] int32.
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/compact_kv.h.)doc");
  // ---- append_kv_
  expose(m, "append_kv_", &uncomp::append_kv_, py::arg("key"), py::arg("value"), py::arg("position"), py::arg("first"),
         py::arg("length"), py::arg("row_start"), py::arg("row_len"), py::arg("key_rows"), py::arg("value_rows"),
         py::arg("slot_position"),
         R"doc(Write new tokens into the free slots behind every row and advance row_len.

Args:
    key, value: [B, Hkv, T, D] new tokens, rotated, any strides with D contiguous.
    position: [B, T] int32 original positions.
    first, length: [B] int32, the real tokens among T, or None.
    row_start: [R + 1] int32 slots.
    row_len: [R] int32 tokens, advanced.
    key_rows, value_rows: [C, D], written.
    slot_position: [C] int32, written.
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/append_kv.h.)doc");
  // ---- decode_attention
  expose(m, "decode_attention", &uncomp::decode_attention, py::arg("query"), py::arg("key_rows"), py::arg("value_rows"),
         py::arg("row_start"), py::arg("row_len"), py::arg("scale"), py::arg("key_basis") = py::none(),
         py::arg("key_bias") = py::none(), py::arg("key_norm") = py::none(), py::arg("key_norm_eps") = 0.0,
         py::arg("rotary_frequency") = py::none(), py::arg("rotary_scale") = 1.0, py::arg("slot_position") = py::none(),
         py::arg("position_offset") = py::none(),
         R"doc(Attention of one query token over the live slots of its cache rows.

Args:
    query: [B, Hq, 1, Dk] float32, float16 or bfloat16, rotated.
    key_rows: [C, Dk], value_rows: [C, Dv], contiguous, dtype of query.
    row_start: [R + 1] int32, slots. row_len: [R] int32, live tokens.
    scale: factor of the logits.
    key_basis [Hkv, r, D], key_bias [Hkv, D], key_norm [D], key_norm_eps, rotary_frequency [rot / 2], rotary_scale,
        slot_position [C],
        position_offset [B]: stored keys are latents [.., r], made again as ops/key_transform.h says.
Returns:
    out [B, Hq, 1, Dv] in the dtype of query, lse [B, Hq] float32 (natural log); an empty row gives 0 and -inf.
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/decode_attention.h.)doc");
  // ---- decode_evict_
  expose(m, "decode_evict_", &uncomp::decode_evict_, py::arg("query"), py::arg("key"), py::arg("value"),
         py::arg("position"), py::arg("row_start"), py::arg("row_len"), py::arg("key_rows"), py::arg("value_rows"),
         py::arg("slot_position"), py::arg("votes"), py::arg("vote_sum"), py::arg("vote_step"), py::arg("order"),
         py::kw_only(), py::arg("window"), py::arg("sink"), py::arg("pool"), py::arg("scale"),
         py::arg("pool_mode") = "max", py::arg("reduce_group") = "mean", py::arg("key_basis") = py::none(),
         py::arg("key_bias") = py::none(), py::arg("key_norm") = py::none(), py::arg("key_norm_eps") = 0.0,
         py::arg("rotary_frequency") = py::none(), py::arg("rotary_scale") = 1.0,
         py::arg("position_offset") = py::none(),
         R"doc(One step of a constant-length cache: attend over row and new token, vote, give up one slot, overwrite it.

Args:
    query, key, value: [B, Hq, 1, Dk], [B, Hkv, 1, Dk], [B, Hkv, 1, Dv] the new token; position: [B] int32.
    row_start: [R + 1] int32 slots; a row's room is its limit.
    row_len [R], key_rows [C, Dk], value_rows [C, Dv], slot_position [C], votes [Wd, C], vote_sum [C], vote_step [R]
        (taken modulo Wd), order [C]: changed in place; integers are int32.
    window, sink: newest and first tokens that stay. pool, pool_mode: odd width and "max" or "avg".
    scale: factor of the logits. reduce_group: "mean", "sum" or "max" over the query group's weights.
    key_basis [Hkv, r, D], key_bias [Hkv, D], key_norm [D], key_norm_eps, rotary_frequency [rot / 2], rotary_scale,
        position_offset [B]: stored keys are latents [.., r], made again as ops/key_transform.h says.
Returns:
    out [B, Hq, 1, Dv] and lse [B, Hq] float32, natural log, over row and new token.
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/decode_evict.h.)doc");
  // ---- ragged_attention
  expose(m, "ragged_attention", &uncomp::ragged_attention, py::arg("query"), py::arg("key"), py::arg("value"),
         py::arg("other_out"), py::arg("other_lse"), py::arg("first"), py::arg("length"), py::arg("key_rows"),
         py::arg("value_rows"), py::arg("row_start"), py::arg("row_len"), py::arg("scale"),
         R"doc(Attention of several new tokens over all live slots of their rows and, causally, over each other.

Args:
    query: [B, Hq, T, Dk] float32, float16 or bfloat16, rotated.
    key, value: [B, Hkv, T, D] the new tokens, attended causally, or None.
    other_out, other_lse: [B, Hq, T, Dv] and [B, Hq, T] float32, attention over other keys to be joined, or None.
    first, length: [B] int32, the valid tokens among T, or None for all.
    key_rows: [C, Dk], value_rows: [C, Dv], row_start: [R + 1] int32, row_len: [R] int32: the past.
    scale: factor of the logits.
Returns:
    out [B, Hq, T, Dv] in the dtype of query, lse [B, Hq, T] float32 (natural log).
Raises:
    TypeError, ValueError, NotImplementedError: see csrc/ops/ragged_attention.h.)doc");
  // ---- gather_tokens
  expose(m, "gather_tokens", &uncomp::gather_tokens, py::arg("tensors"), py::arg("index"),
         R"doc(Gather the tokens of several tensors by one index, in one launch.

Args:
    tensors: 1 to 8 tensors [B or 1, S, ...], any dtype, contiguous behind the token dimension.
    index: [B, N] int32, tokens to take; -1 gives a token of zeros.
Returns:
    One contiguous tensor [B, N, ...] per input.
Raises:
    TypeError, ValueError: see csrc/ops/gather_tokens.h.)doc");
}
