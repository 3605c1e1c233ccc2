// SPDX-License-Identifier: Apache-2.0
// Which compiled kernel attends over latents of r numbers, values of Dv channels and g query heads of a row. Files of
// decode_attention and decode_evict_ compile the same shapes.
#pragma once

#include <cstdint>

namespace uncomp::kernels {

enum class LatentTile { small, wide_values, wide, many_heads, widest, long_rows };

/// The smallest that holds all three; two tiles of heads with small widths are too rare to be compiled apart.
constexpr LatentTile latent_tile(int32_t rank, int32_t value_dim, int32_t group_size) {
  if (value_dim > 128) return LatentTile::widest;
  if (group_size > 8) return LatentTile::many_heads;
  if (rank > 64) return LatentTile::wide;
  return value_dim > 64 ? LatentTile::wide_values : LatentTile::small;
}

/// The same for decode_attention, whose blocks have longer pieces of rows: one of many warps opens them once for all,
/// where a block may have `smem` bytes of shared memory.
constexpr LatentTile attention_tile(int32_t rank, int32_t value_dim, int32_t group_size, int32_t dim, int64_t smem) {
  const LatentTile tile = latent_tile(rank, value_dim, group_size);
  return tile == LatentTile::small && dim <= 128 && smem >= 163 * 1024 ? LatentTile::long_rows : tile;
}

/// What opening a row costs a block of decode_attention, in blocks of slots (core/splits.h).
inline constexpr int32_t kLatentLead = 8;

/// Blocks of a multiprocessor; fp32 has one kernel for all.
constexpr int32_t latent_blocks(LatentTile tile) {
  return tile == LatentTile::small ? 3 : tile == LatentTile::widest || tile == LatentTile::long_rows ? 1 : 2;
}

}  // namespace uncomp::kernels
