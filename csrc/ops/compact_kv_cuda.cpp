// SPDX-License-Identifier: Apache-2.0
// compact_kv: CUDA body.
#include "kernels/compact_kv.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/compact_kv.h"
#include "ops/kv_source.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> compact_kv_cuda(
    const at::Tensor& key, const at::Tensor& value, const MaybeTensor& position, const MaybeTensor& first,
    const MaybeTensor& source_start, const at::Tensor& index, const at::Tensor& index_start,
    const at::Tensor& row_start, int64_t capacity) {
  check_compact_kv(key, value, position, first, source_start, index, index_start, row_start, capacity);
  const CudaScope scope(key);
  const int32_t rows = static_cast<int32_t>(row_start.size(0) - 1);
  at::Tensor key_rows = at::empty({capacity, key.size(-1)}, key.options());
  at::Tensor value_rows = at::empty({capacity, value.size(-1)}, value.options());
  at::Tensor slot_position = at::empty({capacity}, index.options());
  at::Tensor row_len = at::empty({rows}, index.options());

  const bool arena = source_start.has_value();
  kernels::CompactKvParams params{};
  params.key = static_cast<const char*>(key.const_data_ptr());
  params.value = static_cast<const char*>(value.const_data_ptr());
  params.key_stride = byte_strides(key);
  params.value_stride = byte_strides(value);
  params.position = data_or_null<int32_t>(position);
  params.first = data_or_null<int32_t>(first);
  params.source_start = data_or_null<int32_t>(source_start);
  params.index = index.const_data_ptr<int32_t>();
  params.index_start = index_start.const_data_ptr<int32_t>();
  params.rows = RaggedRows{row_start.const_data_ptr<int32_t>(), nullptr, capacity, rows};
  params.row_len = row_len.mutable_data_ptr<int32_t>();
  params.key_rows = static_cast<char*>(key_rows.mutable_data_ptr());
  params.value_rows = static_cast<char*>(value_rows.mutable_data_ptr());
  params.slot_position = slot_position.mutable_data_ptr<int32_t>();
  params.source_slots = arena ? key.size(0) : 0;
  params.sources = arena ? RowSources{1, 1} : check_row_sources("compact_kv", key, rows);
  params.seq_len = arena ? 0 : static_cast<int32_t>(key.size(2));
  params.total = static_cast<int32_t>(index.size(0));
  params.key_bytes = static_cast<int32_t>(key.size(-1) * key.element_size());
  params.value_bytes = static_cast<int32_t>(value.size(-1) * value.element_size());
  params.lane_bytes = kv_lane_bytes(key, value, key_rows, value_rows);
  check_launch("compact_kv", kernels::compact_kv(params, scope.stream()));
  return {key_rows, value_rows, slot_position, row_len};
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("compact_kv", &compact_kv_cuda); }

}  // namespace
}  // namespace uncomp
