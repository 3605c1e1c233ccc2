// SPDX-License-Identifier: Apache-2.0
// Contract of matrix_entropy.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <string_view>
#include <tuple>

#include "core/entropy.h"

namespace uncomp {

/// Truncated matrix entropy of spectra: H_k = - sum over the k largest eigenvalues of s ln s, in nats.
///
/// spectrum   [..., N] float32 or float64, contiguous; eigenvalues descending, shares of the trace; below 0 counts as 0
/// top                 eigenvalues k that enter, 1 to N
/// dim                 D of the states, N or more; the divisor is ln D for every k
/// kind                "truncated"; "renormalized": the k shares are divided by their sum first; "renyi2":
///                     H = - ln sum s^2 over all D eigenvalues, whatever `top`
///
/// Returns    entropy [...] = H / ln D and erank [...] = exp(H), dtype of spectrum. A spectrum of zeros gives 0 and 1;
///            NaN among the eigenvalues that enter gives NaN.
/// Raises     TypeError   spectrum neither float32 nor float64
///            ValueError  no dimension, not contiguous, dim < 2, top outside [1, min(N, D)], N above dim, an unknown
///                        kind, "renyi2" with N other than dim
/// Cost       reads the spectra once; no host sync.
/// Source     docs/method.md "Entropy"; truth: tests/python/reference/matrix_entropy.py.
std::tuple<at::Tensor, at::Tensor> matrix_entropy(const at::Tensor& spectrum, int64_t top, int64_t dim,
                                                  std::string_view kind = "truncated");

/// Raises what the contract says and reads `kind`; called first by every body.
EntropyKind check_matrix_entropy(const at::Tensor& spectrum, int64_t top, int64_t dim, std::string_view kind);

}  // namespace uncomp
