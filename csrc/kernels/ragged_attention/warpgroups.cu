// SPDX-License-Identifier: Apache-2.0
// The host side of the sm_90a path: when it is taken, how much shared memory goes where, tensor maps, workspace.
#include <cudaTypedefs.h>

#include "core/dtype.h"
#include "kernels/ragged_attention/launch.h"
#include "kernels/ragged_attention/warpgroup_block.cuh"
#include "kernels/ragged_attention/warpgroups.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

/// Has static shared memory where the path's kernels have a body.
__global__ void has_body_kernel() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ volatile int32_t mark;
  mark = 0;
#endif
}

cudaError_t encoder(PFN_cuTensorMapEncodeTiled_v12000* encode) {
  static PFN_cuTensorMapEncodeTiled_v12000 known = nullptr;
  if (known == nullptr) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t err =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (err != cudaSuccess) return err;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    known = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }
  *encode = known;
  return cudaSuccess;
}

/// A tensor of half-precision numbers, innermost side first; strides in elements, of all sides but the innermost.
struct Tensor {
  const void* data;
  int rank;
  cuuint64_t sizes[4];
  int64_t strides[3];
};

cudaError_t encode_map(PFN_cuTensorMapEncodeTiled_v12000 encode, const Tensor& tensor, DType dtype, int32_t keys,
                       CUtensorMap* map) {
  const cuuint32_t box[4] = {kPanelWidth, static_cast<cuuint32_t>(keys), 1, 1}, steps[4] = {1, 1, 1, 1};
  cuuint64_t strides[3];
  for (int i = 0; i + 1 < tensor.rank; ++i) {
    // The stride of a side of one has no meaning and need not be a valid one.
    strides[i] = tensor.sizes[i + 1] == 1 ? 16 : static_cast<cuuint64_t>(tensor.strides[i]) * 2;
  }
  const CUresult result =
      encode(map, dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             static_cast<cuuint32_t>(tensor.rank), const_cast<void*>(tensor.data), tensor.sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct NewHeads {
  int32_t batch, kv_heads;
};

NewHeads new_heads(const RaggedAttentionParams& params) {
  return {params.rows.num_rows / params.rows_per_sequence, params.rows_per_sequence / params.rows_per_kv_head};
}

/// What the copy engine can step over.
bool strides_suit(const RaggedAttentionParams& params, const Strides3& strides) {
  const NewHeads heads = new_heads(params);
  const auto suits = [](int64_t stride, int64_t size) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 38);
  };
  return suits(strides.token, params.tokens.seq_len) && suits(strides.head, heads.kv_heads) &&
         suits(strides.batch, heads.batch);
}

bool call_suits(const RaggedAttentionParams& params) {
  const int32_t dim = max_of(params.key_dim, params.value_dim);
  const int64_t packed = int64_t{params.tokens.seq_len} * params.group_size;
  const int64_t queries = kGroupQueries * kMostGroups;
  if (params.dtype == DType::float32 || !(params.scale > 0.0f)) return false;
  if (params.rows.capacity == 0 || !fits<int32_t>(params.rows.capacity + warpgroup_keys(dim))) return false;
  if (!fits<int32_t>(packed + queries) ||
      !fits<int32_t>(ceil_div<int64_t>(packed, kGroupQueries) * params.rows.num_rows)) {
    return false;
  }
  return params.key == nullptr ||
         (strides_suit(params, params.key_strides) && strides_suit(params, params.value_strides));
}

}  // namespace

cudaError_t plan_warpgroups(const RaggedAttentionParams& params, WarpgroupPlan* plan, bool* suits) {
  *suits = false;
  if (query_count(params) == 0 || !call_suits(params)) return cudaSuccess;
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  if (info.capability != 90) return cudaSuccess;
  static const bool has_body = [] {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, has_body_kernel) == cudaSuccess && attributes.sharedSizeBytes > 0;
  }();
  if (!has_body) return cudaSuccess;

  *plan = {};
  const int32_t dim = max_of(params.key_dim, params.value_dim);
  plan->dim = dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  const int64_t packed = int64_t{params.tokens.seq_len} * params.group_size;
  plan->groups = packed <= kGroupQueries ? 1 : kMostGroups;
  plan->query_buffers = plan->dim <= 128 ? 2 : 1;
  plan->slots = kMostSlots;
  while (static_cast<int64_t>(block_bytes(plan->dim, plan->groups, plan->slots, plan->query_buffers)) >
         info.smem_per_block) {
    --plan->slots;
  }
  // The scores of a tile are computed before the values of the one before are done with.
  if (plan->slots < 3) return cudaSuccess;
  plan->tiles_of_row = static_cast<int32_t>(ceil_div<int64_t>(packed, plan->queries()));
  plan->by_tiles_of_row = divisor(plan->tiles_of_row);
  plan->by_group_size = divisor(params.group_size);
  plan->workers = info.sm_count;
  *suits = true;
  return cudaSuccess;
}

int64_t cut_warpgroup_workspace(const RaggedAttentionParams& params, void* memory, WarpgroupPlan* plan) {
  const int64_t ends = round_up<int64_t>(plan->workers * static_cast<int64_t>(sizeof(ShareEnds)), 16);
  const int64_t places = int64_t{2} * plan->workers * plan->queries();
  const int64_t states = places * static_cast<int64_t>(sizeof(float2));
  if (memory != nullptr) {
    auto* bytes = static_cast<unsigned char*>(memory);
    plan->ends = reinterpret_cast<ShareEnds*>(bytes);
    plan->state = reinterpret_cast<float2*>(bytes + ends);
    plan->out = reinterpret_cast<float*>(bytes + ends + states);
  }
  return ends + states + places * params.value_dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t encode_maps(const RaggedAttentionParams& params, const WarpgroupPlan& plan, RaggedMaps* maps) {
  PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  if (const cudaError_t err = encoder(&encode); err != cudaSuccess) return err;
  const int32_t keys = warpgroup_keys(plan.dim);
  const auto arena = [&](const void* rows, int32_t dim, CUtensorMap* map) {
    const Tensor tensor{rows, 2, {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(params.rows.capacity)}, {dim}};
    return encode_map(encode, tensor, params.dtype, keys, map);
  };
  const auto fresh = [&](const void* data, int32_t dim, const Strides3& strides, CUtensorMap* map) {
    const NewHeads heads = new_heads(params);
    const Tensor tensor{data,
                        4,
                        {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(params.tokens.seq_len),
                         static_cast<cuuint64_t>(heads.kv_heads), static_cast<cuuint64_t>(heads.batch)},
                        {strides.token, strides.head, strides.batch}};
    return encode_map(encode, tensor, params.dtype, keys, map);
  };
  cudaError_t err = arena(params.key_rows, params.key_dim, &maps->key_rows);
  if (err == cudaSuccess) err = arena(params.value_rows, params.value_dim, &maps->value_rows);
  if (err != cudaSuccess || params.key == nullptr) return err;
  err = fresh(params.key, params.key_dim, params.key_strides, &maps->key);
  return err == cudaSuccess ? fresh(params.value, params.value_dim, params.value_strides, &maps->value) : err;
}

}  // namespace uncomp::kernels
