// SPDX-License-Identifier: Apache-2.0
// Contract of compact_kv.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace uncomp {

/// Packs chosen tokens of dense K and V, or of another arena, into the rows of a new arena.
///
/// key           [B, Hkv, S, Dk] or [C0, Dk]  float32, float16 or bfloat16, any strides with Dk contiguous, Dk >= 1
/// value         [B, Hkv, S, Dv] or [C0, Dv]  the same, dtype of key; Dv may differ from Dk
/// position      [B, S]  int32  original positions of a dense prompt; without it a token's position is its index;
///               [C0]    int32  slot_position of the source arena, required there
/// first         [B]     int32  first real token of a dense prompt, default 0
/// source_start  [R + 1] int32  slots of the source arena; given exactly when key is an arena
/// index         [total] int32  tokens to keep, any order, counted from first or from the source row's start
/// index_start   [R + 1] int32  entries of index: row r keeps index[index_start[r] .. index_start[r + 1])
/// row_start     [R + 1] int32  slots of the new arena; a row may have more room than tokens
/// capacity      slots C of the new arena, at least row_start[R]
///
/// R is a multiple of B * Hkv; row r of a sequence's R / B rows reads KV head r / (R / B / Hkv), so that rows per
/// query head repeat a head.
///
/// Returns    key_rows [C, Dk], value_rows [C, Dv], slot_position [C] int32, row_len [R] int32 (tokens of each row).
///            Tokens stand in the order of index, bit-equal to their source; slots behind row_len hold anything.
/// Raises     TypeError            a dtype that is not as above
///            ValueError           a wrong shape or device, channels that are not contiguous, first with an arena, an
///                                 arena without position, a negative capacity; on CPU also starts that do not
///                                 ascend or leave their tensor, more tokens than room, an index outside the source
///            NotImplementedError  2^31 or more slots, tokens or entries
///            On CUDA starts are clamped; a row with too little room is cut, an index outside gives a token of zeros
///            at position -1, and both are noted in the device's error word.
/// Cost       reads and writes each kept byte once: 2 * total * (Dk + Dv) elements; no host sync.
/// Source     docs/method.md "Selection"; truth: tests/python/reference/compact_kv.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> compact_kv(
    const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& position,
    const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& source_start, const at::Tensor& index,
    const at::Tensor& index_start, const at::Tensor& row_start, int64_t capacity);

/// Raises what the contract says; called first by every body.
void check_compact_kv(const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& position,
                      const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& source_start,
                      const at::Tensor& index, const at::Tensor& index_start, const at::Tensor& row_start,
                      int64_t capacity);

}  // namespace uncomp
