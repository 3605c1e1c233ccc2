// SPDX-License-Identifier: Apache-2.0
// Logits of many queries: a tile of keys is widened and transposed, so that one vector holds one channel of many keys
// and each query channel is a scalar. A query then owns a contiguous row of logits.
#pragma once

#include "cpu/attend.h"
#include "cpu/loops.h"
#include "cpu/vectors.h"

namespace uncomp::cpu {
namespace {

/// to[d, j] = keys[j, d] for the kKeyTile keys of a tile; keys behind `count` are 0. The next tile is fetched
/// meanwhile: in the layout of a prompt each of its keys may lie on a page of its own.
template <class T>
void transpose_tile(const T* keys, int64_t key_stride, int32_t count, int32_t dim, float* to) {
  for (int32_t j = 0; j < kKeyTile; j += 4) {
    for (int32_t d = 0; d < dim; d += 4) {
      if (d * sizeof(T) % 64 == 0) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) __builtin_prefetch(keys + (j + i + kKeyTile) * key_stride + d, 0, 2);
      }
      Float4 block[4] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (j + i < count) block[i] = load<Lanes<4>>(keys + (j + i) * key_stride + d);
      }
      transpose(block);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) write(to + int64_t{d + i} * kKeyTile + j, block[i]);
    }
  }
}

/// Q queries times C vectors of keys.
template <class V, int Q, int C>
[[gnu::always_inline]] inline void multiply(const float* query, const float* keys, int32_t dim, float scale, float* out,
                                            int64_t out_stride) {
  typedef typename V::Float Float;
  Float sum[Q * C] = {};
  for (int32_t d = 0; d < dim; ++d) {
    Float key[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      key[c] = load<V>(keys + int64_t{d} * kKeyTile + c * V::count);
      keep(key[c]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const float x = query[int64_t{q} * dim + d];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[q * C + c] += key[c] * x;
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) write(out + q * out_stride + c * V::count, sum[q * C + c] * scale);
  }
}

template <class V, int Q>
void multiply_tile(const float* query, const float* keys, int32_t dim, float scale, float* out, int64_t out_stride) {
  constexpr int C = 2;
  static_assert(kKeyTile % (C * V::count) == 0);
  for (int32_t j = 0; j < kKeyTile; j += C * V::count) {
    multiply<V, Q, C>(query, keys + j, dim, scale, out + j, out_stride);
  }
}

/// So few that transposing the keys would take longer than the products: horizontal sums, as in attention.
constexpr int32_t kFewQueries = 16;

/// S tokens from `keys` on against all queries; the tokens 8 behind them are fetched.
template <class V, class T, int S>
[[gnu::always_inline]] inline void few_logits(const Logits& a, const T* keys, float* out) {
  for (int32_t d = 0; d < a.dim; d += 64 / sizeof(T)) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) __builtin_prefetch(keys + (s + 8) * a.key_stride + d);
  }
  int32_t q = 0;
  for (; q + 4 <= a.num_queries; q += 4) {
    dots<V, T, 4, S>(keys, a.key_stride, a.query + int64_t{q} * a.dim, a.dim, a.scale, out + q * a.out_stride,
                     a.out_stride, keys);
  }
  for (; q < a.num_queries; ++q) {
    dots<V, T, 1, S>(keys, a.key_stride, a.query + int64_t{q} * a.dim, a.dim, a.scale, out + q * a.out_stride,
                     a.out_stride, keys);
  }
}

template <class V, class T>
void logits(const Logits& a) {
  if (a.num_queries <= kFewQueries && a.dim % V::count == 0) {
    const T* keys = static_cast<const T*>(a.keys);
    int32_t j = 0;
    for (; j + 2 <= a.count; j += 2) few_logits<V, T, 2>(a, keys + j * a.key_stride, a.out + j);
    for (; j < a.count; ++j) few_logits<V, T, 1>(a, keys + j * a.key_stride, a.out + j);
    return;
  }
  for (int32_t j = 0; j < a.count; j += kKeyTile) {
    const T* keys = static_cast<const T*>(a.keys) + j * a.key_stride;
    transpose_tile(keys, a.key_stride, a.count - j, a.dim, a.scratch);
    const float* query = a.query;
    float* out = a.out + j;
    int32_t left = a.num_queries;
    const auto take = [&](auto multiply_some, int32_t queries) {
      for (; left >= queries; left -= queries, query += int64_t{queries} * a.dim, out += queries * a.out_stride) {
        multiply_some(query, a.scratch, a.dim, a.scale, out, a.out_stride);
      }
    };
    take(multiply_tile<V, 6>, 6);
    take(multiply_tile<V, 4>, 4);
    take(multiply_tile<V, 2>, 2);
    take(multiply_tile<V, 1>, 1);
  }
}

}  // namespace
}  // namespace uncomp::cpu
