// SPDX-License-Identifier: Apache-2.0
// Contract of gather_tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace uncomp {

/// Gathers the tokens of several tensors by one index, in one launch: hidden states, cos, sin and position ids
/// between two layers, or the valid tokens of a batch with holes.
///
/// tensors    1 to 8 tensors [B or 1, S, ...] of any dtypes; what follows the token dimension is contiguous. A first
///            dimension of 1 is shared by all sequences.
/// index      [B, N] int32  tokens to take, any order, repeats allowed; -1 gives a token of zeros (padding)
///
/// Returns    one tensor [B, N, ...] per input, contiguous, bit-equal to its source.
/// Raises     TypeError            index not int32
///            ValueError           no tensor, more than 8, a batch that is neither B nor 1, different S, a token that
///                                 is not contiguous, mixed devices; on CPU an index outside [-1, S)
///            On CUDA an index outside [-1, S) gives zeros and is noted in the device's error word.
/// Cost       reads and writes each gathered byte once: 2 * B * N * token bytes; no host sync.
/// Source     docs/method.md "Hidden-state pruning"; truth: tests/python/reference/gather_tokens.py.
std::vector<at::Tensor> gather_tokens(at::TensorList tensors, const at::Tensor& index);

/// Raises what the contract says; called first by every body.
void check_gather_tokens(at::TensorList tensors, const at::Tensor& index);

}  // namespace uncomp
