// SPDX-License-Identifier: Apache-2.0
// One decode step on every row: attention over row and new token, votes, one token in, one out.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/ragged.h"
#include "kernels/decode_attention/key_transform.h"

namespace uncomp::kernels {

struct DecodeEvictParams {
  const void* query;         // [B, Hq, Dk]   strides below
  const void* key;           // [B, Hkv, Dk]  the new token
  const void* value;         // [B, Hkv, Dv]
  const int32_t* position;   // [B]           of the new token, tokens
  const int32_t* row_start;  // [R + 1]      slots
  int32_t* row_len;          // [R]          tokens; advanced where a row has room
  void* key_rows;            // [C, Dk]
  void* value_rows;          // [C, Dv]
  int32_t* slot_position;    // [C]
  int32_t* votes;            // [Wd, C]      ring, fixed point of core/votes.h
  int32_t* vote_sum;         // [C]          sum over the ring
  int32_t* vote_step;        // [R]          ring row to replace; becomes the next one
  int32_t* order;            // [C]          slot inside the row of the i-th token by position
  void* out;                 // [B, Hq, Dv]  contiguous
  float* lse;                // [B, Hq]      natural logarithm
  int64_t query_batch, query_head, key_batch, key_head, value_batch, value_head;  // strides, elements
  int64_t capacity;                                                               // C, slots
  int32_t num_rows;                                                               // R
  int32_t rows;                                                                   // rows of one sequence
  int32_t rows_per_kv;                                                            // rows that share one new KV head
  int32_t group_size;                                                             // g, query heads of a row, 1 to 16
  int32_t key_dim, value_dim;                                                     // channels, multiples of 8 up to 256
  int32_t vote_window;                                                            // Wd, ring rows, 1 to 64
  int32_t window, sink, pool;                                                     // tokens
  float scale;                                                                    // of the logits
  Pool pool_mode;
  Reduce reduce_group;
  DType dtype;

  UNCOMP_HD RaggedRows ragged() const { return RaggedRows{row_start, row_len, capacity, num_rows}; }
};

/// Bytes of workspace, 256-byte aligned, that `decode_evict` needs on the current device.
cudaError_t decode_evict_workspace_bytes(const DecodeEvictParams& params, int64_t* bytes);

/// One launch where the device has clusters and rows fit on chip; else two, three where rows are few and long. Every
/// value is written before it is read: the workspace may hold anything. With `transform`, `key` and `key_rows` are
/// latents of key_dim numbers, see decode_attention; it says nothing of slot_position and rows_per_kv, which are above.
cudaError_t decode_evict(const DecodeEvictParams& params, void* workspace, cudaStream_t stream,
                         const KeyTransformParams* transform = nullptr);

}  // namespace uncomp::kernels
