// SPDX-License-Identifier: Apache-2.0
// Where the queries of a row of the arena are.
#pragma once

#include <cstdint>

#include "kernels/ragged_attention/ragged_attention.h"

namespace uncomp::kernels {

/// The queries of a row, and which of them are real.
struct QueryRow {
  int32_t row, sequence, first_head, first, count;

  __device__ __forceinline__ bool valid(int32_t token) const { return token >= first && token < first + count; }
};

__device__ __forceinline__ QueryRow query_row(const RaggedAttentionParams& params, int32_t row) {
  const int32_t sequence = row / params.rows_per_sequence;
  return {row, sequence, row % params.rows_per_sequence * params.group_size, params.tokens.begin(sequence),
          params.tokens.count(sequence)};
}

/// First element of a head's query at a token.
__device__ __forceinline__ int64_t query_offset(const RaggedAttentionParams& params, const QueryRow& row, int32_t head,
                                                int32_t token) {
  const Strides3& strides = params.query_strides;
  return row.sequence * strides.batch + (row.first_head + head) * strides.head + token * strides.token;
}

/// Place of a head's query at a token among all results, [B, Hq, T].
__device__ __forceinline__ int64_t result_index(const RaggedAttentionParams& params, const QueryRow& row, int32_t head,
                                                int32_t token) {
  const int64_t heads = int64_t{params.rows_per_sequence} * params.group_size;
  return (row.sequence * heads + row.first_head + head) * params.tokens.seq_len + token;
}

/// Whether queries can be read 16 bytes at a time.
__device__ __forceinline__ bool query_has_vectors(const RaggedAttentionParams& params) {
  const Strides3& strides = params.query_strides;
  return reinterpret_cast<uintptr_t>(params.query) % 16 == 0 && strides.batch % 8 == 0 && strides.head % 8 == 0 &&
         strides.token % 8 == 0;
}

}  // namespace uncomp::kernels
