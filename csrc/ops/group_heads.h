// SPDX-License-Identifier: Apache-2.0
// Contract of group_heads.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

namespace uncomp {

/// Ranks the rows of a layer (or of a model) by entropy and cuts the ranking into groups.
///
/// entropy     [N, H] float32  one ranking per N, rows contiguous; ties go to the lower row, -0 equals +0, NaN is last
/// num_groups  G, 1 to H. H = a * G + e: every group has a rows, the e left over go to the outer groups in turn: last,
///             first, last but one, second, ...
/// order       "ascending": group 0 holds the lowest entropy; "reverse": group ids turned round, ranks as they are
///
/// Returns    group [N, H] int32, 0 .. G - 1; rank [N, H] int32, a permutation of 0 .. H - 1 in every N.
/// Raises     TypeError   entropy not float32
///            ValueError  a wrong shape, rows that are not contiguous, num_groups outside 1 .. H, an unknown order
/// Cost       O(N * H * H) comparisons on CUDA, O(N * H * log H) on CPU; one launch, no host sync.
/// Source     docs/method.md "Grouping"; truth: tests/python/reference/group_heads.py.
std::tuple<at::Tensor, at::Tensor> group_heads(const at::Tensor& entropy, int64_t num_groups,
                                               std::string_view order = "ascending");

/// Raises what the contract says; called first by every body. True for "reverse".
bool check_group_heads(const at::Tensor& entropy, int64_t num_groups, std::string_view order);

}  // namespace uncomp
