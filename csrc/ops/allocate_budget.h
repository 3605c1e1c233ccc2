// SPDX-License-Identifier: Apache-2.0
// Contract of allocate_budget.
#pragma once

#include <ATen/core/Tensor.h>

namespace uncomp {

/// Token limit of every row. The limits of a sequence sum to its total exactly, and rows of a heavier group never get
/// fewer tokens than rows of a lighter one.
///
/// group   [N, H] int32         group of each row, 0 .. G - 1
/// weight  [G] or [N, G] int32  weight of each group, 1 .. 2^20; one table for all sequences or one each
/// length  [N] int32            tokens of the sequence that reach the layer
/// total   [N] int32            tokens that the rows of the sequence share, at least H * floor
/// floor                        tokens that every row keeps in any case (window and sinks)
///
/// The limit of row h is clamp(lambda * weight, low, high), where lambda makes the sum the total. A total below
/// length * H means low = floor, high = length; otherwise low = max(floor, length) without an upper bound. Whole parts
/// first, then one token each to the largest fractions, ties to the lower row. All in exact integers.
///
/// Returns  [N, H] int32 limits, tokens.
/// Raises   TypeError            a tensor not int32
///          ValueError           a wrong shape, device or layout, floor outside [0, 2^31), no group; on CPU a group id,
///                               weight or length outside its range, a total below H * floor
///          NotImplementedError  more than 16384 rows or groups
///          On CUDA ids, weights and lengths are clamped, a total that is too small gives every row the floor, and both
///          are noted in the device's error word.
/// Cost     a few passes over H and G, one block per sequence; no host sync.
/// Source   docs/method.md "Budget"; truth: tests/python/reference/allocate_budget.py.
at::Tensor allocate_budget(const at::Tensor& group, const at::Tensor& weight, const at::Tensor& length,
                           const at::Tensor& total, int64_t floor);

/// Raises what the contract says, device data apart; called first by every body.
void check_allocate_budget(const at::Tensor& group, const at::Tensor& weight, const at::Tensor& length,
                           const at::Tensor& total, int64_t floor);

}  // namespace uncomp
