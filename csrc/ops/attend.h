// SPDX-License-Identifier: Apache-2.0
// Attention with its log-sum-exp in plain ATen, for CPU bodies.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace uncomp {

struct Attended {
  at::Tensor out;  // [N, Dv] float32
  at::Tensor lse;  // [N] float32, natural log; -inf where nothing was visible, and out is 0 there
};

/// N queries over n keys in float32. query [N, Dk], keys [n, Dk], values [n, Dv]; visible [N, n] bool, default all.
Attended attend(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, double scale,
                const std::optional<at::Tensor>& visible = std::nullopt);

/// What one attention over both sets of keys would have given.
Attended merge(const Attended& a, const Attended& b);

}  // namespace uncomp
