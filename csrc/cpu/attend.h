// SPDX-License-Identifier: Apache-2.0
// Attention of a few queries over a run of tokens: logits, softmax, weighted sum of the values.
#pragma once

#include "cpu/loops.h"
#include "cpu/vectors.h"

namespace uncomp::cpu {
namespace {

/// Tokens whose values stay in the first-level cache while all channels are summed.
constexpr int32_t kValueTokens = 32;
/// Bytes of keys that are fetched ahead of those at work: the hardware alone stops at each page.
constexpr int32_t kFetchAhead = 4096;

/// Logits of G queries and S tokens. `ahead` is what will be read soon, one token behind the other.
template <class V, class T, int G, int S>
[[gnu::always_inline]] inline void dots(const T* keys, int64_t key_stride, const float* query, int32_t dim, float scale,
                                        float* out, int64_t out_stride, const T* ahead) {
  typedef typename V::Float Float;
  constexpr int kDots = (G * S + 3) / 4 * 4;
  Float sum[kDots] = {};
  for (int32_t d = 0; d < dim; d += V::count) {
    Float key[S];
    __builtin_prefetch(ahead + S * d, 0, 2);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) key[s] = load<V>(keys + s * key_stride + d);
#pragma GCC unroll 8
    for (int h = 0; h < G; ++h) {
      Float q = load<V>(query + int64_t{h} * dim + d);
      keep(q);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sum[h * S + s] += key[s] * q;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kDots; i += 4) {
    const Float4 four = sums_of(fold(sum[i]), fold(sum[i + 1]), fold(sum[i + 2]), fold(sum[i + 3])) * scale;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      if (i + k < G * S) out[(i + k) / S * out_stride + (i + k) % S] = four[k];
    }
  }
}

/// Adds weight times value of `count` tokens to C vectors of channels of G sums. Meanwhile `ahead` is fetched, as many
/// bytes as are read.
template <class V, class T, int G, int C>
[[gnu::always_inline]] inline void add_values(const T* values, int32_t dim, const float* weight, int64_t weight_stride,
                                              int32_t count, float* sum, const T* ahead) {
  typedef typename V::Float Float;
  Float total[G * C];
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) total[h * C + c] = load<V>(sum + int64_t{h} * dim + c * V::count);
  }
  for (int32_t j = 0; j < count; ++j) {
    __builtin_prefetch(ahead + int64_t{j} * (C * V::count));
    Float value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = load<V>(values + int64_t{j} * dim + c * V::count);
#pragma GCC unroll 8
    for (int h = 0; h < G; ++h) {
      const float w = weight[h * weight_stride + j];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) total[h * C + c] += value[c] * w;
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) write(sum + int64_t{h} * dim + c * V::count, total[h * C + c]);
  }
}

/// Turns logits into weights; returns the largest logit and their sum.
template <class V>
[[gnu::always_inline]] inline void softmax_row(float* logits, int32_t count, float* largest_out, float* total_out) {
  typedef typename V::Float Float;
  const Float lowest = Float{} - __builtin_inff();
  Float most = lowest, sum = {};
  int32_t j = 0;
  for (; j + V::count <= count; j += V::count) most = larger(load<V>(logits + j), most);
  float largest = largest_lane<V>(most);
  for (int32_t i = j; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
  const float base = largest == -__builtin_inff() ? 0.0f : largest;
  for (j = 0; j + V::count <= count; j += V::count) {
    const Float w = exp_of<V>(load<V>(logits + j) - base);
    write(logits + j, w);
    sum += w;
  }
  if (j < count) {
    float rest[V::count];
    for (int i = 0; i < V::count; ++i) rest[i] = j + i < count ? logits[j + i] : -__builtin_inff();
    const Float w = exp_of<V>(load<V>(rest) - base);
    write(rest, w);
    for (int i = 0; j + i < count; ++i) logits[j + i] = rest[i];
    sum += w;
  }
  *largest_out = largest;
  *total_out = sum_lanes(sum);
}

/// One pass over keys and one over values for up to four heads. As it nears an end it fetches what comes next: the
/// values, and behind them the tokens that follow this run, which the next run will want.
template <class V, class K, class T, int G>
void attend_heads(const Attention& a, int32_t head) {
  constexpr int S = G == 4 ? 2 : (G == 1 ? 8 : 4);
  constexpr int C = G >= 3 ? 2 : (G == 2 ? 4 : 8);
  const K* keys = static_cast<const K*>(a.keys);
  const T* values = static_cast<const T*>(a.values);
  const float* query = a.query + int64_t{head} * a.key_dim;
  float* weight = a.weight + head * a.weight_stride;
  const int32_t far = kFetchAhead / (static_cast<int32_t>(sizeof(K)) * a.key_dim);
  int32_t j = 0;
  for (; j + S <= a.count; j += S) {
    const int32_t next = j + far;
    const K* ahead = next < a.count ? keys + int64_t{next} * a.key_dim
                                    : reinterpret_cast<const K*>(values + int64_t{next - a.count} * a.value_dim);
    dots<V, K, G, S>(keys + int64_t{j} * a.key_dim, a.key_dim, query, a.key_dim, a.scale, weight + j, a.weight_stride,
                     ahead);
  }
  for (; j < a.count; ++j) {
    dots<V, K, G, 1>(keys + int64_t{j} * a.key_dim, a.key_dim, query, a.key_dim, a.scale, weight + j, a.weight_stride,
                     reinterpret_cast<const K*>(values));
  }
  for (int h = 0; h < G; ++h) {
    softmax_row<V>(weight + h * a.weight_stride, a.count, a.largest + head + h, a.total + head + h);
  }
  float* sum = a.sum + int64_t{head} * a.value_dim;
  std::memset(sum, 0, sizeof(float) * G * a.value_dim);
  for (j = 0; j < a.count; j += kValueTokens) {
    const int32_t next = j + kValueTokens, tokens = next <= a.count ? kValueTokens : a.count - j;
    const T* of_tile = values + int64_t{j} * a.value_dim;
    const T* ahead = next < a.count ? values + int64_t{next} * a.value_dim
                                    : reinterpret_cast<const T*>(keys + int64_t{a.count} * a.key_dim);
    int32_t d = 0;
    for (; d + C * V::count <= a.value_dim; d += C * V::count) {
      add_values<V, T, G, C>(of_tile + d, a.value_dim, weight + j, a.weight_stride, tokens, sum + d,
                             ahead + int64_t{kValueTokens} * d);
    }
    for (; d < a.value_dim; d += V::count) {
      add_values<V, T, G, 1>(of_tile + d, a.value_dim, weight + j, a.weight_stride, tokens, sum + d,
                             ahead + int64_t{kValueTokens} * d);
    }
  }
}

template <class V, class K, class T>
void attend(const Attention& a) {
  int32_t head = 0;
  for (; head + 4 <= a.group_size; head += 4) attend_heads<V, K, T, 4>(a, head);
  switch (a.group_size - head) {
    case 3:
      return attend_heads<V, K, T, 3>(a, head);
    case 2:
      return attend_heads<V, K, T, 2>(a, head);
    case 1:
      return attend_heads<V, K, T, 1>(a, head);
    default:
      return;
  }
}

}  // namespace
}  // namespace uncomp::cpu
