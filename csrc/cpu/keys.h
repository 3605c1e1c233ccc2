// SPDX-License-Identifier: Apache-2.0
// Keys made again from what is stored of them: latent times basis, bias, norm, rotation.
#pragma once

#include "cpu/loops.h"
#include "cpu/vectors.h"

namespace uncomp::cpu {
namespace {

constexpr int32_t kMostKeyDim = 256;

/// G tokens times C vectors of channels of the basis, behind the bias.
template <class V, int G, int C>
[[gnu::always_inline]] inline void add_basis(const MakeKeys& a, const float* latent, int32_t d, float* keys) {
  typedef typename V::Float Float;
  Float sum[G * C];
#pragma GCC unroll 8
  for (int i = 0; i < G * C; ++i) sum[i] = a.bias == nullptr ? Float{} : load<V>(a.bias + d + i % C * V::count);
  for (int32_t k = 0; k < a.rank; ++k) {
    Float basis[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) basis[c] = load<V>(a.basis + int64_t{k} * a.dim + d + c * V::count);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[g * C + c] += basis[c] * latent[g * kMostKeyDim + k];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < G * C; ++i) write(keys + int64_t{i / C} * a.dim + d + i % C * V::count, sum[i]);
}

/// The products of G tokens.
template <class V, class T, int G>
void multiply_tokens(const MakeKeys& a, int32_t first) {
  constexpr int C = 2;
  float latent[G * kMostKeyDim];
  for (int g = 0; g < G; ++g) {
    const T* token = static_cast<const T*>(a.latents) + int64_t{first + g} * a.rank;
    int32_t k = 0;
    for (; k < a.rank; k += V::count) write(latent + g * kMostKeyDim + k, load<V>(token + k));
  }
  float* keys = a.keys + int64_t{first} * a.dim;
  int32_t d = 0;
  for (; d + C * V::count <= a.dim; d += C * V::count) add_basis<V, G, C>(a, latent, d, keys);
  for (; d < a.dim; d += V::count) add_basis<V, G, 1>(a, latent, d, keys);
}

template <class V>
[[gnu::always_inline]] inline void normalise(const MakeKeys& a, float* key) {
  typename V::Float squares = {};
  for (int32_t d = 0; d < a.dim; d += V::count) {
    const typename V::Float x = load<V>(key + d);
    squares += x * x;
  }
  const float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(a.dim) + a.norm_eps);
  for (int32_t d = 0; d < a.dim; d += V::count) write(key + d, load<V>(key + d) * factor * load<V>(a.norm + d));
}

/// cos and sin of angles in parts of 2^32 of a full turn.
template <class V>
[[gnu::always_inline]] inline void cos_sin(typename V::Int angle, typename V::Float* cos, typename V::Float* sin) {
  typedef typename V::Float Float;
  typedef typename V::Int Int;
  typedef typename V::Uint Uint;
  // The nearest quarter, and what is left of the angle: within an eighth of a turn.
  const Uint quarter = ((Uint)angle + (1u << 29)) >> 30;
  const Float x = __builtin_convertvector((Int)((Uint)angle - (quarter << 30)), Float) * 1.46291807926716e-9f;
  const Float y = x * x;
  const Float c = (((y * 2.44331571e-5f - 1.38873162e-3f) * y + 4.16666456e-2f) * y - 0.5f) * y + 1.0f;
  const Float s = (((y * 2.7183114e-6f - 1.98393348e-4f) * y + 8.33332818e-3f) * y - 1.66666667e-1f) * y * x + x;
  const Int odd = (Int)(quarter << 31) >> 31;
  const Uint flip_sin = (quarter & 2u) << 30, flip_cos = ((quarter + 1u) & 2u) << 30;
  *cos = (Float)((Uint)(((Int)s & odd) | ((Int)c & ~odd)) ^ flip_cos);
  *sin = (Float)((Uint)(((Int)c & odd) | ((Int)s & ~odd)) ^ flip_sin);
}

/// Channel i turns with channel i + pairs.
template <class V>
[[gnu::always_inline]] inline void rotate(const MakeKeys& a, int64_t position, float* key) {
  int32_t angle[kMostKeyDim / 2 + V::count];
  for (int32_t i = 0; i < a.pairs; ++i) {
    angle[i] = static_cast<int32_t>((static_cast<uint64_t>(position) * a.turn[i]) >> 32);
  }
  typename V::Float cos, sin;
  int32_t i = 0;
  for (; i + V::count <= a.pairs; i += V::count) {
    cos_sin<V>(read<typename V::Int>(angle + i), &cos, &sin);
    const typename V::Float x = load<V>(key + i), y = load<V>(key + a.pairs + i);
    write(key + i, (x * cos - y * sin) * a.rotary_scale);
    write(key + a.pairs + i, (y * cos + x * sin) * a.rotary_scale);
  }
  if (i == a.pairs) return;
  for (int32_t j = a.pairs; j < i + V::count; ++j) angle[j] = 0;
  cos_sin<V>(read<typename V::Int>(angle + i), &cos, &sin);
  for (int32_t j = 0; i + j < a.pairs; ++j) {
    const float x = key[i + j], y = key[a.pairs + i + j];
    key[i + j] = (x * cos[j] - y * sin[j]) * a.rotary_scale;
    key[a.pairs + i + j] = (y * cos[j] + x * sin[j]) * a.rotary_scale;
  }
}

template <class V, class T>
void make_keys(const MakeKeys& a) {
  constexpr int G = 4;
  int32_t j = 0;
  for (; j + G <= a.count; j += G) multiply_tokens<V, T, G>(a, j);
  for (; j < a.count; ++j) multiply_tokens<V, T, 1>(a, j);
  for (j = 0; j < a.count; ++j) {
    float* key = a.keys + int64_t{j} * a.dim;
    if (a.norm != nullptr) normalise<V>(a, key);
    if (a.pairs > 0) rotate<V>(a, int64_t{a.position[j]} + a.offset, key);
  }
}

}  // namespace
}  // namespace uncomp::cpu
