// SPDX-License-Identifier: Apache-2.0
// The warpgroup of the Gram kernel of sm_90a that copies: it walks the block's pieces and keeps the ring full.
#pragma once

#include "kernels/matrix_spectrum/ring.cuh"
#include "kernels/matrix_spectrum/rows.cuh"
#include "kernels/matrix_spectrum/stream_tile.cuh"

namespace uncomp::kernels {

/// Tiles of all pieces into `ring`, a stage after the other: `full` and `empty` are barriers, 8 bytes a stage.
template <int kTile>
__device__ __forceinline__ void copy_tiles(const MatrixSpectrumParams& params, int32_t head_tiles, uint32_t ring,
                                           uint32_t full, uint32_t empty) {
  using S = StreamShape<kTile>;
  const uint32_t thread = threadIdx.x % kGroupThreads, piece = thread % 8, row = thread / 8;
  const uint32_t place = ring + row * 128 + (piece ^ (row & 7)) * 16;
  const int64_t token_bytes = params.strides.token * 2;
  uint32_t base = 0;  // number of the piece's first tile
  for (int32_t at = block_begin(params, head_tiles, blockIdx.x); at >= 0;) {
    const Piece p = piece_at(params, head_tiles, at);
    const int32_t length = p.end - p.begin;
    const char* from = head_base<false>(params, p.matrix, params.tokens.begin(p.matrix / params.heads)) +
                       (p.begin + static_cast<int32_t>(row)) * token_bytes + piece * 16;
    uint32_t stage = base % S::kStages, parity = base / S::kStages % 2 ^ 1;
    for (int32_t left = length - static_cast<int32_t>(row), t = 0; t < length; t += S::kTokens) {
      barrier_wait(empty + stage * 8, parity);
      const uint32_t to = place + stage * S::kStageBytes;
#pragma unroll
      for (int u = 0; u < S::kTokens / 16; ++u) {
#pragma unroll
        for (int q = 0; q < S::kPanels; ++q) {
          ring_copy16(to + u * 2048 + q * S::kPanelBytes, from + 16 * u * token_bytes + q * 128,
                      16 * u < left && q * 64 + static_cast<int>(piece) * 8 < params.dim);
        }
      }
      ring_copies_arrive(full + stage * 8);
      from += S::kTokens * token_bytes;
      left -= S::kTokens;
      if (++stage == S::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    base += ceil_div(length, S::kTokens);
    at = p.next;
  }
}

}  // namespace uncomp::kernels
