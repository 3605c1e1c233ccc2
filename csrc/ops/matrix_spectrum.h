// SPDX-License-Identifier: Apache-2.0
// Contract of matrix_spectrum.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace uncomp {

/// Largest eigenvalues of the trace-one token covariance of every head: the mean token is taken away, every token is
/// scaled to length 1, and Sigma = Z^T Z / tr(Z^T Z).
///
/// states     [B, H, S, D] float32, float16 or bfloat16, on CPU also float64; any strides with D contiguous
/// first      [B] int32    first real token; default 0. Other columns are padding, may hold NaN and are not read
/// length     [B] int32    real tokens; default all from `first` on
/// top                     eigenvalues wanted, 1 to D
///
/// Returns    [B, H, top] float32 (float64 for float64 states), descending, shares of the trace, at least 0.
///            A token that equals the mean up to rounding (distance at most 1e-5 of its length) adds nothing. Where no
///            token is left, all eigenvalues are 0. NaN or Inf in a real token makes that head's eigenvalues NaN; so
///            does, on CUDA, a channel whose sum over the tokens passes the range of float32.
/// Raises     TypeError            states not floating point, first or length not int32
///            ValueError           a wrong shape, D < 2, top outside [1, D], D not contiguous, mixed devices; on CPU
///                                 first or length negative or first + length above S (on CUDA they are clamped)
///            NotImplementedError  on CUDA, D above kMaxSpectrumDim; the CPU takes any D
/// Cost       CUDA: reads states twice, in pieces that fit into L2 where a head does; 2 * B * H * S * D^2 operations,
///            56 % of them done; O(D) barriers for the eigenvalues; no host sync. Same input, same bits.
/// Source     docs/method.md "Entropy"; truth: tests/python/reference/matrix_spectrum.py.
at::Tensor matrix_spectrum(const at::Tensor& states, const std::optional<at::Tensor>& first,
                           const std::optional<at::Tensor>& length, int64_t top);

/// Raises what the contract says; called first by every body.
void check_matrix_spectrum(const at::Tensor& states, const std::optional<at::Tensor>& first,
                           const std::optional<at::Tensor>& length, int64_t top);

}  // namespace uncomp
