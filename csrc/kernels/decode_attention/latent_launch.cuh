// SPDX-License-Identifier: Apache-2.0
// The compiled shapes of attention over half-precision latents.
#pragma once

#include "kernels/decode_attention/latent_block.cuh"
#include "kernels/decode_attention/latent_shapes.h"

namespace uncomp::kernels {

template <LatentTile kTile>
struct LatentShapeOf;
template <>
struct LatentShapeOf<LatentTile::small> {
  using type = LatentShape<64, 64, 8, 32, 1, 4, latent_blocks(LatentTile::small)>;
};
template <>
struct LatentShapeOf<LatentTile::wide_values> {
  using type = LatentShape<64, 128, 8, 16, 2, 4, latent_blocks(LatentTile::wide_values)>;
};
template <>
struct LatentShapeOf<LatentTile::wide> {
  using type = LatentShape<128, 128, 8, 16, 2, 4, latent_blocks(LatentTile::wide)>;
};
template <>
struct LatentShapeOf<LatentTile::many_heads> {
  using type = LatentShape<128, 128, 16, 16, 2, 4, latent_blocks(LatentTile::many_heads)>;
};
template <>
struct LatentShapeOf<LatentTile::widest> {
  using type = LatentShape<128, 256, 16, 16, 1, 4, latent_blocks(LatentTile::widest)>;
};
template <>
struct LatentShapeOf<LatentTile::long_rows> {
  using type = LatentShape<64, 64, 8, 32, 1, 12, latent_blocks(LatentTile::long_rows), 64>;
};

/// launch(LatentShape{}) with the compiled shape of a tile of latent_tile().
template <class Launch>
cudaError_t with_latent_shape(LatentTile tile, Launch&& launch) {
  switch (tile) {
    case LatentTile::small:
      return launch(LatentShapeOf<LatentTile::small>::type{});
    case LatentTile::wide_values:
      return launch(LatentShapeOf<LatentTile::wide_values>::type{});
    case LatentTile::wide:
      return launch(LatentShapeOf<LatentTile::wide>::type{});
    case LatentTile::many_heads:
      return launch(LatentShapeOf<LatentTile::many_heads>::type{});
    case LatentTile::widest:
      return launch(LatentShapeOf<LatentTile::widest>::type{});
    case LatentTile::long_rows:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace uncomp::kernels
