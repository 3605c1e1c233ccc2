// SPDX-License-Identifier: Apache-2.0
// A warp moves one piece of one token: pieces of all tensors lie side by side in the grid's x dimension.
#include "kernels/gather_tokens.h"

#include <algorithm>

#include "core/math.h"
#include "kernels/common/errors.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kPieceBytes = 4096;
constexpr int kWarps = 4;

template <class Lane>
__device__ __forceinline__ void move_piece(const char* from, char* to, int32_t bytes, int lane, bool zero) {
  const int32_t count = bytes / static_cast<int32_t>(sizeof(Lane));
  const Lane* source = reinterpret_cast<const Lane*>(from);
  Lane* target = reinterpret_cast<Lane*>(to);
#pragma unroll 4
  for (int32_t i = lane; i < count; i += 32) target[i] = zero ? Lane{} : source[i];
}

__global__ void __launch_bounds__(32 * kWarps)
    gather_tokens_kernel(const __grid_constant__ GatherTokensParams params, int64_t num_tokens, int32_t* error) {
  const int lane = threadIdx.x % 32, piece = blockIdx.x;
  const int64_t token = static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.x / 32 +
                        static_cast<int64_t>(blockIdx.z) * gridDim.y * kWarps;
  if (token >= num_tokens) return;

  // The tensor whose pieces hold this block's column.
  int t = 0;
  while (t + 1 < params.num_tensors && piece >= params.source[t + 1].first_piece) ++t;
  const GatherTokensParams::Source& source = params.source[t];
  const int32_t begin = (piece - source.first_piece) * kPieceBytes;
  const int32_t bytes = min_of(kPieceBytes, source.token_bytes - begin);

  const int32_t wanted = params.index[token];
  const bool outside = wanted < -1 || wanted >= params.seq_len;
  if (outside && lane == 0) note_error(error, DeviceError::gather_tokens_index);
  const bool zero = outside || wanted < 0;
  const int64_t sequence = token / params.num_wanted;
  const char* from =
      source.from + (zero ? 0 : sequence * source.sequence_stride + wanted * source.token_stride + begin);
  char* to = source.to + token * source.token_bytes + begin;
  switch (source.lane_bytes) {
    case 16:
      return move_piece<uint4>(from, to, bytes, lane, zero);
    case 8:
      return move_piece<uint2>(from, to, bytes, lane, zero);
    case 4:
      return move_piece<uint32_t>(from, to, bytes, lane, zero);
    case 2:
      return move_piece<uint16_t>(from, to, bytes, lane, zero);
    default:
      return move_piece<uint8_t>(from, to, bytes, lane, zero);
  }
}

}  // namespace

cudaError_t gather_tokens(GatherTokensParams params, cudaStream_t stream) {
  int32_t pieces = 0;
  for (int t = 0; t < params.num_tensors; ++t) {
    params.source[t].first_piece = pieces;
    pieces += ceil_div(params.source[t].token_bytes, kPieceBytes);
  }
  const int64_t tokens = static_cast<int64_t>(params.batch) * params.num_wanted;
  if (tokens == 0 || pieces == 0) return cudaSuccess;
  int32_t* error = nullptr;
  if (const cudaError_t err = error_word(&error); err != cudaSuccess) return err;
  const int64_t groups = ceil_div<int64_t>(tokens, kWarps), rows = std::min<int64_t>(groups, 65535);
  const dim3 grid(pieces, static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(groups, rows)));
  gather_tokens_kernel<<<grid, 32 * kWarps, 0, stream>>>(params, tokens, error);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
