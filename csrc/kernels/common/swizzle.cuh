// SPDX-License-Identifier: Apache-2.0
// Rows of half-precision numbers in shared memory whose 16-byte chunks are XOR-swizzled by the row, so that ldmatrix
// (8 rows, one chunk) and cp.async (one row, 8 chunks) never meet a bank twice.
#pragma once

namespace uncomp::kernels {

/// Element offset of `chunk` (8 numbers) of `row`, rows of kTile numbers (a multiple of 64).
template <int kTile>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kTile + ((chunk ^ (row & 7)) * 8);
}

}  // namespace uncomp::kernels
