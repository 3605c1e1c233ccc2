// SPDX-License-Identifier: Apache-2.0
// Attention with its log-sum-exp in plain ATen, for CPU bodies.
#include "ops/attend.h"

#include <ATen/ops/exp.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>

#include <limits>

namespace uncomp {
namespace {

/// lse as something that may be subtracted: where nothing is visible, -inf - (-inf) would be NaN.
at::Tensor as_offset(const at::Tensor& lse) { return at::where(lse.isneginf(), 0.0, lse); }

}  // namespace

Attended attend(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, double scale,
                const std::optional<at::Tensor>& visible) {
  at::Tensor logits = at::mm(query.to(at::kFloat), keys.to(at::kFloat).t()).mul_(scale);
  if (visible.has_value()) logits.masked_fill_(visible->logical_not(), -std::numeric_limits<double>::infinity());
  const at::Tensor lse = at::logsumexp(logits, {1});
  return {at::mm(logits.sub_(as_offset(lse).unsqueeze(1)).exp_(), values.to(at::kFloat)), lse};
}

Attended merge(const Attended& a, const Attended& b) {
  const at::Tensor lse = at::logaddexp(a.lse, b.lse), offset = as_offset(lse);
  const auto weighted = [&](const Attended& part) {
    const at::Tensor weight = at::exp(part.lse - offset).unsqueeze(-1);
    return at::where(weight.eq(0), 0.0, part.out.to(at::kFloat) * weight);  // nothing seen: out may hold anything
  };
  return {weighted(a) + weighted(b), lse};
}

}  // namespace uncomp
