// SPDX-License-Identifier: Apache-2.0
// Contract of append_kv_.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace uncomp {

/// Writes new tokens into the free slots behind every row and advances row_len.
///
/// key            [B, Hkv, T, Dk]  float32, float16 or bfloat16, any strides with Dk contiguous, Dk >= 1; rotated
/// value          [B, Hkv, T, Dv]  the same, dtype of key; Dv may differ from Dk
/// position       [B, T]   int32   original positions
/// first, length  [B]      int32   the real tokens first .. first + length - 1 among T; default: all from first on
/// row_start      [R + 1]  int32   slots, ascending
/// row_len        [R]      int32   tokens of each row; advanced by the number of new tokens
/// key_rows       [C, Dk]          dtype of key, contiguous; written
/// value_rows     [C, Dv]          dtype of key, contiguous; written
/// slot_position  [C]      int32   written
///
/// R is a multiple of B * Hkv; row r of a sequence's R / B rows takes KV head r / (R / B / Hkv).
///
/// Returns    nothing. A row takes all its new tokens or, without room for all of them, none.
/// Raises     TypeError            a dtype that is not as above
///            ValueError           a wrong shape or device, an arena that is not contiguous, memory shared by what is
///                                 written with another argument; on CPU also starts that do not ascend, row_len
///                                 outside [0, room], first or length outside T, and a row without room, before
///                                 anything of any row is written
///            NotImplementedError  2^31 or more slots, or rows times new tokens
///            On CUDA starts and lengths are clamped; a row without room stays as it is and is noted in the device's
///            error word.
/// Cost       reads each new byte once a row, writes it once; no host sync. One launch where a warp covers the new
///            tokens of a row (8 tokens of 256 bytes), two otherwise.
/// Source     docs/method.md "Decode"; truth: tests/python/reference/append_kv.py.
void append_kv_(const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
                const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& length,
                const at::Tensor& row_start, at::Tensor& row_len, at::Tensor& key_rows, at::Tensor& value_rows,
                at::Tensor& slot_position);

/// Raises what the contract says; called first by every body.
void check_append_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
                     const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& length,
                     const at::Tensor& row_start, const at::Tensor& row_len, const at::Tensor& key_rows,
                     const at::Tensor& value_rows, const at::Tensor& slot_position);

}  // namespace uncomp
