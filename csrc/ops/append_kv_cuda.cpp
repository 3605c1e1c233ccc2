// SPDX-License-Identifier: Apache-2.0
// append_kv_: CUDA body.
#include "kernels/append_kv.h"

#include <torch/library.h>

#include "ops/append_kv.h"
#include "ops/kv_source.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

void append_kv_cuda(const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
                    const MaybeTensor& first, const MaybeTensor& length, const at::Tensor& row_start,
                    at::Tensor& row_len, at::Tensor& key_rows, at::Tensor& value_rows, at::Tensor& slot_position) {
  check_append_kv(key, value, position, first, length, row_start, row_len, key_rows, value_rows, slot_position);
  const CudaScope scope(key);
  const int32_t rows = static_cast<int32_t>(row_len.size(0));
  kernels::AppendKvParams params{};
  params.key = static_cast<const char*>(key.const_data_ptr());
  params.value = static_cast<const char*>(value.const_data_ptr());
  params.key_stride = byte_strides(key);
  params.value_stride = byte_strides(value);
  params.position = position.const_data_ptr<int32_t>();
  params.valid =
      ValidTokens{data_or_null<int32_t>(first), data_or_null<int32_t>(length), static_cast<int32_t>(key.size(2))};
  params.row_len = row_len.mutable_data_ptr<int32_t>();
  params.rows = RaggedRows{row_start.const_data_ptr<int32_t>(), params.row_len, key_rows.size(0), rows};
  params.key_rows = static_cast<char*>(key_rows.mutable_data_ptr());
  params.value_rows = static_cast<char*>(value_rows.mutable_data_ptr());
  params.slot_position = slot_position.mutable_data_ptr<int32_t>();
  params.sources = check_row_sources("append_kv_", key, rows);
  params.key_bytes = static_cast<int32_t>(key.size(3) * key.element_size());
  params.value_bytes = static_cast<int32_t>(value.size(3) * value.element_size());
  params.lane_bytes = kv_lane_bytes(key, value, key_rows, value_rows);
  check_launch("append_kv_", kernels::append_kv(params, scope.stream()));
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("append_kv_", &append_kv_cuda); }

}  // namespace
}  // namespace uncomp
