// SPDX-License-Identifier: Apache-2.0
// How stored latents become keys (ops/key_transform.h), for the kernels that make them while they attend.
#pragma once

#include <cstdint>

namespace uncomp::kernels {

/// key = rotate(norm(latent * basis + bias)). Without `basis` keys are stored as they are.
struct KeyTransformParams {
  const void* basis;               // [Hkv, r, D], 16-byte aligned
  const float* bias;               // [Hkv, D] or null
  const float* norm;               // [D] or null
  const float* frequency;          // [pairs], radians a token; channel i turns with channel i + pairs
  const int32_t* slot_position;    // [C], read where pairs > 0
  const int32_t* position_offset;  // [B] or null
  int32_t dim;                     // D, channels of the query, a multiple of 16 up to 256
  int32_t pairs;                   // 2 * pairs <= D
  int32_t rows_per_kv;             // rows of a sequence that share a KV head
  float norm_eps;
  float rotary_scale;  // factor of cos and sin
};

}  // namespace uncomp::kernels
