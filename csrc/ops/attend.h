// SPDX-License-Identifier: Apache-2.0
// Attention with its log-sum-exp in plain ATen, for CPU bodies.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace uncomp {

struct Attended {
  at::Tensor out;  // [N, Dv] float32, or the dtype of the query from attend_fused
  at::Tensor lse;  // [N] float32, natural log; -inf where nothing was visible, and out is 0 there
};

/// N queries over n keys in float32. query [N, Dk], keys [n, Dk], values [n, Dv]; visible [N, n] bool, default all.
Attended attend(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, double scale,
                const std::optional<at::Tensor>& visible = std::nullopt);

/// What one attention over both sets of keys would have given.
Attended merge(const Attended& a, const Attended& b);

/// The same as `attend` through torch's fused CPU kernel: query [B, H, N, D], keys and values [B, H, n, D] with n >= 1
/// and one D. Returns out [B, H, N, D] in the dtype of query and lse [B, H, N] float32.
Attended attend_fused(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, double scale);

}  // namespace uncomp
