// SPDX-License-Identifier: Apache-2.0
// compact_kv: checks, the C++ entry and the CPU body.
#include "ops/compact_kv.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "ops/call.h"
#include "ops/kv_source.h"
#include "ops/threads.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "compact_kv";
using Packed = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

}  // namespace

Packed compact_kv(const at::Tensor& key, const at::Tensor& value, const MaybeTensor& position, const MaybeTensor& first,
                  const MaybeTensor& source_start, const at::Tensor& index, const at::Tensor& index_start,
                  const at::Tensor& row_start, int64_t capacity) {
  static const auto op =
      op_handle<Packed(const at::Tensor&, const at::Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                       const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)>("uncomp::compact_kv");
  return op.call(key, value, position, first, source_start, index, index_start, row_start, capacity);
}

void check_compact_kv(const at::Tensor& key, const at::Tensor& value, const MaybeTensor& position,
                      const MaybeTensor& first, const MaybeTensor& source_start, const at::Tensor& index,
                      const at::Tensor& index_start, const at::Tensor& row_start, int64_t capacity) {
  const bool arena = source_start.has_value();
  check_kv(kOp, key, value, arena ? 2 : 4,
           arena ? "[C0, D] where source_start is given" : "[B, Hkv, S, D] where source_start is not given");
  check_rank(kOp, "index", index, 1, "[total]");
  check_int32(kOp, "index", index, {index.size(0)}, "[total]", "key", key);
  check_int32_size(kOp, "entries of index", index.size(0));
  const int64_t rows = check_row_start(kOp, row_start, "key", key);
  check_int32(kOp, "index_start", index_start, {rows + 1}, "[R + 1]", "key", key);
  if (arena) {
    check_int32(kOp, "source_start", *source_start, {rows + 1}, "[R + 1]", "key", key);
    UNCOMP_CHECK_VALUE(kOp, position.has_value(), "position must be given where key is an arena");
    UNCOMP_CHECK_VALUE(kOp, !first.has_value(), "first must be None where key is an arena");
    check_int32(kOp, "position", position, {key.size(0)}, "[C0]", "key", key);
    check_int32_size(kOp, "slots of key", key.size(0));
  } else {
    check_row_sources(kOp, key, rows);
    check_int32(kOp, "position", position, {key.size(0), key.size(2)}, "[B, S]", "key", key);
    check_int32(kOp, "first", first, {key.size(0)}, "[B]", "key", key);
    check_int32_size(kOp, "tokens of key", key.size(2));
  }
  UNCOMP_CHECK_VALUE(kOp, capacity >= 0, "capacity must not be negative; got ", capacity);
  check_int32_size(kOp, "capacity", capacity);
}

namespace {

/// Where the tokens of one row lie in the source.
struct SourceRow {
  int64_t key, value, position;  // byte offsets of token 0, offset of its position
  int64_t tokens;
};

Packed compact_kv_cpu(const at::Tensor& key, const at::Tensor& value, const MaybeTensor& position,
                      const MaybeTensor& first, const MaybeTensor& source_start, const at::Tensor& index,
                      const at::Tensor& index_start, const at::Tensor& row_start, int64_t capacity) {
  check_compact_kv(key, value, position, first, source_start, index, index_start, row_start, capacity);
  const int64_t rows = row_start.size(0) - 1;
  const Strides3 key_stride = byte_strides(key), value_stride = byte_strides(value);
  const int32_t *starts = row_start.const_data_ptr<int32_t>(), *entries = index_start.const_data_ptr<int32_t>();
  const int32_t *token = index.const_data_ptr<int32_t>(), *source_starts = data_or_null<int32_t>(source_start);
  const int32_t* positions = data_or_null<int32_t>(position);
  const ValidTokens valid{data_or_null<int32_t>(first), nullptr,
                          source_starts != nullptr ? 0 : static_cast<int32_t>(key.size(2))};
  const RowSources sources = source_starts != nullptr ? RowSources{1, 1} : check_row_sources(kOp, key, rows);
  const auto source_row = [&](int64_t r) -> SourceRow {
    if (source_starts != nullptr) {
      const int64_t begin = source_starts[r];
      return {begin * key_stride.token, begin * value_stride.token, begin, source_starts[r + 1] - begin};
    }
    const int64_t sequence = sources.sequence(static_cast<int32_t>(r)), head = sources.kv_head(static_cast<int32_t>(r));
    const int64_t begin = valid.begin(static_cast<int32_t>(sequence));
    return {sequence * key_stride.batch + head * key_stride.head + begin * key_stride.token,
            sequence * value_stride.batch + head * value_stride.head + begin * value_stride.token,
            sequence * valid.seq_len + begin, valid.seq_len - begin};
  };

  check_ascending(kOp, "row_start", starts, rows, capacity);
  check_ascending(kOp, "index_start", entries, rows, index.size(0));
  if (source_starts != nullptr) {
    check_ascending(kOp, "source_start", source_starts, rows, key.size(0));
  } else {
    check_valid_tokens(kOp, valid, key.size(0));
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t kept = entries[r + 1] - entries[r], room = starts[r + 1] - starts[r], tokens = source_row(r).tokens;
    UNCOMP_CHECK_VALUE(kOp, kept <= room, "kept tokens must fit into the row; row ", r, " keeps ", kept,
                       " and has room for ", room);
    for (int64_t i = entries[r]; i < entries[r + 1]; ++i) {
      UNCOMP_CHECK_VALUE(kOp, token[i] >= 0 && token[i] < tokens, "index must lie in [0, ", tokens, "); got ", token[i],
                         " for row ", r);
    }
  }

  at::Tensor key_rows = at::empty({capacity, key.size(-1)}, key.options());
  at::Tensor value_rows = at::empty({capacity, value.size(-1)}, value.options());
  at::Tensor slot_position = at::empty({capacity}, index.options());
  at::Tensor row_len = at::empty({rows}, index.options());
  const int64_t key_bytes = key.size(-1) * key.element_size(), value_bytes = value.size(-1) * value.element_size();
  const char* from_key = static_cast<const char*>(key.const_data_ptr());
  const char* from_value = static_cast<const char*>(value.const_data_ptr());
  char* to_key = static_cast<char*>(key_rows.mutable_data_ptr());
  char* to_value = static_cast<char*>(value_rows.mutable_data_ptr());
  int32_t* to_position = slot_position.mutable_data_ptr<int32_t>();
  int32_t* lengths = row_len.mutable_data_ptr<int32_t>();
  const auto kept = [&](int32_t r) { return entries[r + 1] - entries[r]; };
  for (int32_t r = 0; r < rows; ++r) lengths[r] = kept(r);
  const std::vector<RowPart> parts = row_parts(static_cast<int32_t>(rows), kTaskTokens, kept);
  const int64_t most_threads = threads_for(index.size(0) * (key.size(-1) + value.size(-1)));
  share(static_cast<int64_t>(parts.size()), most_threads, [&](int64_t task, int64_t) {
    const RowPart& part = parts[task];
    const SourceRow source = source_row(part.row);
    const int64_t begin = int64_t{entries[part.row]} + part.first;
    int64_t slot = int64_t{starts[part.row]} + part.first;
    for (int64_t i = begin; i < begin + part.count; ++i, ++slot) {
      std::memcpy(to_key + slot * key_bytes, from_key + source.key + token[i] * key_stride.token, key_bytes);
      std::memcpy(to_value + slot * value_bytes, from_value + source.value + token[i] * value_stride.token,
                  value_bytes);
      to_position[slot] = positions == nullptr ? token[i] : positions[source.position + token[i]];
    }
  });
  return {key_rows, value_rows, slot_position, row_len};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("compact_kv", &compact_kv_cpu); }

}  // namespace
}  // namespace uncomp
