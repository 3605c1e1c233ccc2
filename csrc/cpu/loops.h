// SPDX-License-Identifier: Apache-2.0
// The inner loops of the CPU bodies, compiled once an instruction set and chosen once a process. No torch, no threads,
// no allocation. Sums are float32 in a fixed order: a loop gives the same bits for the same arguments.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace uncomp::cpu {

/// Attention of g queries over n tokens that lie one behind the other, before the division by the total. Fills
///   largest[h]   the largest logit; -inf where there is none
///   weight[h, j] exp(logit - largest), and total[h], the sum over j
///   sum[h, :]    sum over j of weight times value
struct Attention {
  const float* query;                             // [g, key_dim]
  const void* keys;                               // [n, key_dim] of the table's dtype
  const void* values;                             // [n, value_dim]
  int32_t count, group_size, key_dim, value_dim;  // dims are multiples of 8
  float scale;
  float* weight;  // [g, weight_stride]
  int64_t weight_stride;
  float *largest, *total;  // [g]
  float* sum;              // [g, value_dim]
};

/// Keys of n tokens from their latents: rotate(norm(latent * basis + bias)).
struct MakeKeys {
  const void* latents;                      // [n, rank] of the table's dtype
  const float* basis;                       // [rank, dim]
  const float* bias;                        // [dim] or null
  const float* norm;                        // [dim] weight of an RMS norm, or null
  const uint64_t* turn;                     // [pairs] core/rotary.h; channel i turns with channel i + pairs
  const int32_t* position;                  // [n], read where pairs > 0
  int32_t offset, count, rank, dim, pairs;  // rank, dim are multiples of 8, at most 256
  float norm_eps, rotary_scale;
  float* keys;  // [n, dim]
};

/// Logits of Q queries and at most kMostKeys keys: out[q, j] = scale * query[q] . key[j].
struct Logits {
  const float* query;  // [Q, dim]
  const void* keys;    // [n, dim], `key_stride` elements from token to token
  int64_t key_stride;
  int32_t num_queries, count, dim;  // dim is a multiple of 8
  float scale;
  float* out;          // [Q, out_stride]; columns up to the next multiple of kKeyTile may be written
  int64_t out_stride;  // a multiple of kKeyTile
  float* scratch;      // kKeyTile * dim
};

/// Logits of one query made weights in place: weight[j] = exp(logit[j] - largest) for the first `visible` tokens, 0
/// for those behind, up to the next multiple of kKeyTile.
struct Softmax {
  float* logits;
  int32_t visible, count;
  float *largest, *total;  // of the visible; -inf and 0 where there is none
};

/// The weights of one token under g heads become one vote: weight[h, j] * factor[h], reduced, in fixed point.
struct Votes {
  const float* weight;  // [g, weight_stride]
  int64_t weight_stride;
  const float* factor;  // [g]
  int32_t group_size, count, bits;
  bool largest;   // the largest of the heads, else their mean; NaN in any head votes 0
  int32_t* vote;  // [count]
};

struct OfDType {
  void (*attend)(const Attention&);
  /// The same with keys in float32, whatever the dtype of the values.
  void (*attend_made)(const Attention&);
  void (*make_keys)(const MakeKeys&);
  void (*logits)(const Logits&);
  /// out[j] = L2 norm of token j of [count, dim], `stride` elements from token to token; dim is a multiple of 8.
  void (*norms)(const void* tokens, int64_t stride, int32_t count, int32_t dim, float* out);
};

struct Loops {
  OfDType of[3];  // by DType
  void (*softmax)(const Softmax&);
  /// to[i] = exp(from[i] - offset); from may be to.
  void (*exp_minus)(const float* from, float offset, int32_t count, float* to);
  /// out[j] = sum over i of factor[i] * rows[i, j].
  void (*weighted_sum)(const float* rows, int64_t stride, const float* factor, int32_t num_rows, int32_t count,
                       float* out);
  void (*votes)(const Votes&);
  /// sum[j] += vote[j] - ring[j], modulo 2^32, and ring[j] = vote[j].
  void (*turn_ring)(const int32_t* vote, int32_t count, int32_t* ring, int32_t* sum);
  /// Place of the smallest pooled score among `first` .. count - 1, the lowest of equals; -1 where there is none.
  /// Pools are cut at both ends. `scratch` [count].
  int32_t (*smallest_pooled)(const int32_t* sum, int32_t count, int32_t first, int32_t pool, Pool mode,
                             int32_t* scratch);

  const OfDType& operator[](DType dtype) const { return of[static_cast<int>(dtype)]; }
};

/// Keys that are transposed and multiplied together.
inline constexpr int32_t kKeyTile = 32;

enum class InstructionSet { baseline, avx2, avx512 };

/// The copy for an instruction set; null where it was not compiled or this machine cannot run it.
const Loops* loops_for(InstructionSet set);

/// The best copy for this machine, or a lesser one that torch's ATEN_CPU_CAPABILITY (default, avx2, avx512) asks for.
const Loops& loops();

}  // namespace uncomp::cpu
