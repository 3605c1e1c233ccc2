// SPDX-License-Identifier: Apache-2.0
// Reading 8 neighbouring channels of a token: as they lie in memory, so that loads can be in flight, then as float32.
#pragma once

#include "kernels/common/types.cuh"
#include "kernels/matrix_spectrum.h"

namespace uncomp::kernels {

inline constexpr int kLaneChannels = 8;

/// 8 channels: 16 bytes of half precision or, `kWide`, 32 bytes of float32.
template <bool kWide>
struct alignas(16) RawChannels {
  static constexpr int kWords = kWide ? 8 : 4;
  uint32_t word[kWords];
};

/// First byte of the first real token of matrix b * H + h.
template <bool kWide>
__device__ __forceinline__ const char* head_base(const MatrixSpectrumParams& params, int32_t matrix, int32_t begin) {
  const int64_t b = matrix / params.heads, h = matrix % params.heads;
  const int64_t element = b * params.strides.batch + h * params.strides.head + begin * params.strides.token;
  return static_cast<const char*>(params.states) + element * (kWide ? 4 : 2);
}

/// Channels from `channel` on of the token at `row`; what lies behind `dim` is 0, and so is all of a token not `live`,
/// of which nothing is read.
template <bool kWide>
__device__ __forceinline__ RawChannels<kWide> load_channels(const char* row, int channel, int dim, bool vectors,
                                                            bool live) {
  RawChannels<kWide> raw = {};
  if (!live || channel >= dim) return raw;
  if (vectors) {
    const uint4* from = reinterpret_cast<const uint4*>(row + channel * (kWide ? 4 : 2));
#pragma unroll
    for (int i = 0; i < RawChannels<kWide>::kWords / 4; ++i) {
      const uint4 four = from[i];
      raw.word[4 * i] = four.x;
      raw.word[4 * i + 1] = four.y;
      raw.word[4 * i + 2] = four.z;
      raw.word[4 * i + 3] = four.w;
    }
    return raw;
  }
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    if (channel + j >= dim) continue;
    if constexpr (kWide) {
      raw.word[j] = reinterpret_cast<const uint32_t*>(row)[channel + j];
    } else {
      const uint32_t bits = reinterpret_cast<const uint16_t*>(row)[channel + j];
      raw.word[j / 2] |= bits << (16 * (j % 2));
    }
  }
  return raw;
}

/// `bfloat` tells the two half-precision types apart; the branch is uniform.
template <bool kWide>
__device__ __forceinline__ void unpack_channels(const RawChannels<kWide>& raw, bool bfloat, float (&x)[kLaneChannels]) {
  if constexpr (kWide) {
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) x[j] = __uint_as_float(raw.word[j]);
  } else if (bfloat) {
#pragma unroll
    for (int j = 0; j < kLaneChannels / 2; ++j) {
      x[2 * j] = __uint_as_float(raw.word[j] << 16);
      x[2 * j + 1] = __uint_as_float(raw.word[j] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kLaneChannels / 2; ++j) {
      const float2 two = __half22float2(reinterpret_cast<const __half2&>(raw.word[j]));
      x[2 * j] = two.x;
      x[2 * j + 1] = two.y;
    }
  }
}

}  // namespace uncomp::kernels
