// SPDX-License-Identifier: Apache-2.0
// append_kv_: checks, the C++ entry and the CPU body.
#include "ops/append_kv.h"

#include <torch/library.h>

#include <cstring>

#include "ops/call.h"
#include "ops/kv_source.h"
#include "ops/threads.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "append_kv_";
using MaybeTensor = std::optional<at::Tensor>;

void check_target(const char* name, const at::Tensor& rows, const char* source_name, const at::Tensor& source) {
  check_same_dtype(kOp, name, rows, source_name, source);
  check_device(kOp, name, rows, source_name, source);
  check_rank(kOp, name, rows, 2, "[C, D]");
  UNCOMP_CHECK_VALUE(kOp, rows.size(1) == source.size(3), name, " must have ", source.size(3), " channels like ",
                     source_name, "; got ", rows.size(1));
  check_contiguous(kOp, name, rows);
}

}  // namespace

void append_kv_(const at::Tensor& key, const at::Tensor& value, const at::Tensor& position, const MaybeTensor& first,
                const MaybeTensor& length, const at::Tensor& row_start, at::Tensor& row_len, at::Tensor& key_rows,
                at::Tensor& value_rows, at::Tensor& slot_position) {
  static const auto op =
      op_handle<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const MaybeTensor&, const MaybeTensor&,
                     const at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&)>("uncomp::append_kv_");
  op.call(key, value, position, first, length, row_start, row_len, key_rows, value_rows, slot_position);
}

void check_append_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
                     const MaybeTensor& first, const MaybeTensor& length, const at::Tensor& row_start,
                     const at::Tensor& row_len, const at::Tensor& key_rows, const at::Tensor& value_rows,
                     const at::Tensor& slot_position) {
  check_kv(kOp, key, value, 4, "[B, Hkv, T, D]");
  check_int32(kOp, "position", position, {key.size(0), key.size(2)}, "[B, T]", "key", key);
  check_int32(kOp, "first", first, {key.size(0)}, "[B]", "key", key);
  check_int32(kOp, "length", length, {key.size(0)}, "[B]", "key", key);
  const int64_t rows = check_row_start(kOp, row_start, "key", key);
  check_row_sources(kOp, key, rows);
  check_int32_size(kOp, "new tokens", key.size(2));
  check_int32_size(kOp, "rows times new tokens", rows * key.size(2));
  check_int32(kOp, "row_len", row_len, {rows}, "[R]", "key", key);
  check_target("key_rows", key_rows, "key", key);
  check_target("value_rows", value_rows, "value", value);
  UNCOMP_CHECK_VALUE(kOp, value_rows.size(0) == key_rows.size(0), "value_rows must have ", key_rows.size(0),
                     " slots like key_rows; got ", value_rows.size(0));
  check_int32_size(kOp, "slots of key_rows", key_rows.size(0));
  check_int32(kOp, "slot_position", slot_position, {key_rows.size(0)}, "[C]", "key", key);
  check_apart(
      kOp, {{"row_len", row_len}, {"key_rows", key_rows}, {"value_rows", value_rows}, {"slot_position", slot_position}},
      {{"key", key},
       {"value", value},
       {"position", position},
       {"first", first},
       {"length", length},
       {"row_start", row_start}});
}

namespace {

void append_kv_cpu(const at::Tensor& key, const at::Tensor& value, const at::Tensor& position, const MaybeTensor& first,
                   const MaybeTensor& length, const at::Tensor& row_start, at::Tensor& row_len, at::Tensor& key_rows,
                   at::Tensor& value_rows, at::Tensor& slot_position) {
  check_append_kv(key, value, position, first, length, row_start, row_len, key_rows, value_rows, slot_position);
  const int32_t rows = static_cast<int32_t>(row_len.size(0));
  const RowSources sources = check_row_sources(kOp, key, rows);
  const ValidTokens valid{data_or_null<int32_t>(first), data_or_null<int32_t>(length),
                          static_cast<int32_t>(key.size(2))};
  const int32_t *starts = row_start.const_data_ptr<int32_t>(), *positions = position.const_data_ptr<int32_t>();
  int32_t* lengths = row_len.mutable_data_ptr<int32_t>();
  check_ascending(kOp, "row_start", starts, rows, key_rows.size(0));
  check_valid_tokens(kOp, valid, key.size(0));
  for (int32_t r = 0; r < rows; ++r) {
    const int64_t room = starts[r + 1] - starts[r], count = valid.count(sources.sequence(r));
    UNCOMP_CHECK_VALUE(kOp, lengths[r] >= 0 && lengths[r] <= room, "row_len must lie in [0, room]; got ", lengths[r],
                       " for row ", r, " with room ", room);
    UNCOMP_CHECK_VALUE(kOp, lengths[r] + count <= room, "row_len + new tokens must fit into the row; row ", r, " has ",
                       lengths[r], " of ", room, " slots taken and gets ", count, " more");
  }

  const Strides3 key_stride = byte_strides(key), value_stride = byte_strides(value);
  const int64_t key_bytes = key.size(3) * key.element_size(), value_bytes = value.size(3) * value.element_size();
  const char* from_key = static_cast<const char*>(key.const_data_ptr());
  const char* from_value = static_cast<const char*>(value.const_data_ptr());
  char* to_key = static_cast<char*>(key_rows.mutable_data_ptr());
  char* to_value = static_cast<char*>(value_rows.mutable_data_ptr());
  int32_t* to_position = slot_position.mutable_data_ptr<int32_t>();
  const auto new_tokens = [&](int32_t r) { return valid.count(sources.sequence(r)); };
  const std::vector<RowPart> parts = row_parts(rows, kTaskTokens, new_tokens);
  const int64_t most_threads = threads_for(rows * key.size(2) * (key.size(3) + value.size(3)));
  share(static_cast<int64_t>(parts.size()), most_threads, [&](int64_t task, int64_t) {
    const RowPart& part = parts[task];
    const int32_t sequence = sources.sequence(part.row), head = sources.kv_head(part.row);
    const int64_t begin = int64_t{valid.begin(sequence)} + part.first;
    int64_t slot = int64_t{starts[part.row]} + lengths[part.row] + part.first;
    for (int64_t t = begin; t < begin + part.count; ++t, ++slot) {
      std::memcpy(to_key + slot * key_bytes,
                  from_key + sequence * key_stride.batch + head * key_stride.head + t * key_stride.token, key_bytes);
      std::memcpy(to_value + slot * value_bytes,
                  from_value + sequence * value_stride.batch + head * value_stride.head + t * value_stride.token,
                  value_bytes);
      to_position[slot] = positions[static_cast<int64_t>(sequence) * valid.seq_len + t];
    }
  });
  for (int32_t r = 0; r < rows; ++r) lengths[r] += new_tokens(r);
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("append_kv_", &append_kv_cpu); }

}  // namespace
}  // namespace uncomp
