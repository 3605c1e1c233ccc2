// SPDX-License-Identifier: Apache-2.0
// Loops over rows of logits, weights and votes.
#pragma once

#include "cpu/attend.h"
#include "cpu/loops.h"
#include "cpu/vectors.h"

namespace uncomp::cpu {
namespace {

template <class V>
void softmax(const Softmax& a) {
  softmax_row<V>(a.logits, a.visible, a.largest, a.total);
  const int32_t end = (a.count + kKeyTile - 1) / kKeyTile * kKeyTile;
  for (int32_t j = a.visible; j < end; ++j) a.logits[j] = 0.0f;
}

template <class V>
void exp_minus(const float* from, float offset, int32_t count, float* to) {
  int32_t j = 0;
  for (; j + V::count <= count; j += V::count) write(to + j, exp_of<V>(load<V>(from + j) - offset));
  if (j == count) return;
  float rest[V::count] = {};
  for (int32_t i = 0; j + i < count; ++i) rest[i] = from[j + i];
  write(rest, exp_of<V>(load<V>(rest) - offset));
  for (int32_t i = 0; j + i < count; ++i) to[j + i] = rest[i];
}

template <class V>
void weighted_sum(const float* rows, int64_t stride, const float* factor, int32_t num_rows, int32_t count, float* out) {
  constexpr int C = 4;
  int32_t j = 0;
  for (; j + C * V::count <= count; j += C * V::count) {
    typename V::Float sum[C] = {};
    for (int32_t i = 0; i < num_rows; ++i) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[c] += load<V>(rows + i * stride + j + c * V::count) * factor[i];
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) write(out + j + c * V::count, sum[c]);
  }
  for (; j < count; ++j) {
    float sum = 0.0f;
    for (int32_t i = 0; i < num_rows; ++i) sum += rows[i * stride + j] * factor[i];
    out[j] = sum;
  }
}

template <class V, class T>
void norms(const void* tokens, int64_t stride, int32_t count, int32_t dim, float* out) {
  for (int32_t j = 0; j < count; ++j) {
    const T* token = static_cast<const T*>(tokens) + j * stride;
    typename V::Float sum = {};
    for (int32_t d = 0; d < dim; d += V::count) {
      const typename V::Float x = load<V>(token + d);
      sum += x * x;
    }
    out[j] = __builtin_sqrtf(sum_lanes(sum));
  }
}

/// core/votes.h quantize_vote for a vector of weights: halves upwards, clamped to [0, 2^bits], 0 for NaN.
template <class V>
[[gnu::always_inline]] inline typename V::Int quantize(typename V::Float weight, int32_t bits) {
  typedef typename V::Float Float;
  typedef typename V::Int Int;
  const Float one = Float{} + 1.0f, zero = {};
  const float unit = static_cast<float>(int32_t{1} << bits);
  const Float inside = weight > zero ? (weight < one ? weight : one) : zero;
  const Float scaled = inside * unit;
  const Int whole = __builtin_convertvector(scaled, Int);
  const Float rest = scaled - __builtin_convertvector(whole, Float);
  return whole - (Int)(rest >= 0.5f);  // a true comparison is -1
}

template <class V>
[[gnu::always_inline]] inline typename V::Float reduce_heads(const Votes& a, const float* weight) {
  typedef typename V::Float Float;
  Float all = load<V>(weight) * a.factor[0];
  for (int32_t h = 1; h < a.group_size; ++h) {
    const Float one = load<V>(weight + h * a.weight_stride) * a.factor[h];
    if (a.largest) {
      all = (one > all) | (one != one) ? one : all;
    } else {
      all += one;
    }
  }
  return a.largest ? all : all / static_cast<float>(a.group_size);
}

template <class V>
void votes(const Votes& a) {
  int32_t j = 0;
  for (; j + V::count <= a.count; j += V::count) {
    write(a.vote + j, quantize<V>(reduce_heads<V>(a, a.weight + j), a.bits));
  }
  if (j == a.count) return;
  Votes rest = a;
  float weight[16 * V::count] = {};
  for (int32_t h = 0; h < a.group_size; ++h) {
    for (int32_t i = 0; j + i < a.count; ++i) weight[h * V::count + i] = a.weight[h * a.weight_stride + j + i];
  }
  rest.weight_stride = V::count;
  const typename V::Int last = quantize<V>(reduce_heads<V>(rest, weight), a.bits);
  for (int32_t i = 0; j + i < a.count; ++i) a.vote[j + i] = last[i];
}

void turn_ring(const int32_t* __restrict vote, int32_t count, int32_t* __restrict ring, int32_t* __restrict sum) {
  for (int32_t j = 0; j < count; ++j) {
    // Unsigned, so that a state that is no sum of votes wraps instead of being undefined.
    const uint32_t change = static_cast<uint32_t>(vote[j]) - static_cast<uint32_t>(ring[j]);
    sum[j] = static_cast<int32_t>(static_cast<uint32_t>(sum[j]) + change);
    ring[j] = vote[j];
  }
}

/// Sums over pools by a running total; exact in 64 bits.
int32_t smallest_sum(const int32_t* sum, int32_t count, int32_t first, int32_t half) {
  int32_t begin = first > half ? first - half : 0, end = begin, place = -1;
  int64_t total = 0, least = INT64_MAX;
  for (int32_t i = first; i < count; ++i) {
    for (; end < count && end - i <= half; ++end) total += sum[end];
    for (; begin < i - half; ++begin) total -= sum[begin];
    if (total < least) {
      least = total;
      place = i;
    }
  }
  return place;
}

int32_t smallest_largest(const int32_t* sum, int32_t count, int32_t first, int32_t half, int32_t* __restrict scratch) {
  // The pool of a place in the middle is 2 * half + 1 whole; those near an end are cut.
  for (int32_t i = first; i < count; ++i) scratch[i] = sum[i];
  for (int32_t k = 1; k <= half; ++k) {
    const int32_t from = first > k ? first : k, to = count - k;
    for (int32_t i = from; i < count; ++i) scratch[i] = sum[i - k] > scratch[i] ? sum[i - k] : scratch[i];
    for (int32_t i = first; i < to; ++i) scratch[i] = sum[i + k] > scratch[i] ? sum[i + k] : scratch[i];
  }
  int32_t least = INT32_MAX;
  for (int32_t i = first; i < count; ++i) least = scratch[i] < least ? scratch[i] : least;
  for (int32_t i = first; i < count; ++i) {
    if (scratch[i] == least) return i;
  }
  return -1;
}

int32_t smallest_pooled(const int32_t* sum, int32_t count, int32_t first, int32_t pool, Pool mode, int32_t* scratch) {
  if (mode == Pool::avg) return smallest_sum(sum, count, first, pool / 2);
  return smallest_largest(sum, count, first, pool / 2, scratch);
}

}  // namespace
}  // namespace uncomp::cpu
