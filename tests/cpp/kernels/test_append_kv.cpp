// SPDX-License-Identifier: Apache-2.0
// The launch itself: one warp or several a row, every access width, guard bands, rows that have no room.
#include "kernels/append_kv.h"

#include <algorithm>

#include "core/errors.h"
#include "core/lanes.h"
#include "kernels/runtime.h"
#include "support/catch.hpp"
#include "support/device.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

/// Appends `tokens` new tokens to rows that hold `lengths` of `rooms` and compares every byte of the arena.
void run(std::vector<int32_t> lengths, const std::vector<int32_t>& rooms, int32_t heads, int32_t tokens,
         int32_t key_bytes, int32_t value_bytes, int32_t wanted_code = 0) {
  const int32_t rows = static_cast<int32_t>(lengths.size());
  std::vector<int32_t> starts{0}, positions(tokens);
  for (const int32_t room : rooms) starts.push_back(starts.back() + room);
  for (int32_t t = 0; t < tokens; ++t) positions[t] = 1000 + t;
  const int32_t capacity = starts.back();
  const std::vector<char> from_key = numbered_bytes(size_t(heads) * tokens * key_bytes, 1);
  const std::vector<char> from_value = numbered_bytes(size_t(heads) * tokens * value_bytes, 2);
  DeviceArray<char> key(from_key), value(from_value), key_rows(size_t(capacity) * key_bytes),
      value_rows(size_t(capacity) * value_bytes);
  DeviceArray<int32_t> position(positions), row_start(starts), row_len(lengths), slot_position(capacity);
  std::vector<char> want_key = key_rows.host(), want_value = value_rows.host();
  std::vector<int32_t> want_position = slot_position.host(), want_len = lengths;

  kernels::AppendKvParams params{};
  params.key = key.data();
  params.value = value.data();
  params.key_stride = {0, int64_t{tokens} * key_bytes, key_bytes};
  params.value_stride = {0, int64_t{tokens} * value_bytes, value_bytes};
  params.position = position.data();
  params.valid = {nullptr, nullptr, tokens};
  params.row_len = row_len.data();
  params.rows = {row_start.data(), params.row_len, capacity, rows};
  params.key_rows = key_rows.data();
  params.value_rows = value_rows.data();
  params.slot_position = slot_position.data();
  params.sources = {rows, heads};
  params.key_bytes = key_bytes;
  params.value_bytes = value_bytes;
  params.lane_bytes = common_lane_bytes({key_bytes, value_bytes});
  cuda_ok(kernels::append_kv(params, nullptr));

  for (int32_t r = 0; r < rows; ++r) {
    if (lengths[r] + tokens > rooms[r]) continue;
    const int64_t head = params.sources.kv_head(r);
    for (int32_t t = 0; t < tokens; ++t) {
      const int64_t slot = int64_t{starts[r]} + lengths[r] + t, token = head * tokens + t;
      std::copy_n(from_key.begin() + token * key_bytes, key_bytes, want_key.begin() + slot * key_bytes);
      std::copy_n(from_value.begin() + token * value_bytes, value_bytes, want_value.begin() + slot * value_bytes);
      want_position[slot] = positions[t];
    }
    want_len[r] += tokens;
  }
  INFO("tokens " << tokens << " bytes " << key_bytes << ", " << value_bytes);
  int32_t code = 0;
  cuda_ok(kernels::take_error(&code));
  REQUIRE(code == wanted_code);
  REQUIRE(row_len.host() == want_len);
  REQUIRE(slot_position.host() == want_position);
  REQUIRE((key_rows.host() == want_key));
  REQUIRE((value_rows.host() == want_value));
  REQUIRE((key_rows.guards_intact() && value_rows.guards_intact()));
  REQUIRE((slot_position.guards_intact() && row_len.guards_intact()));
}

}  // namespace

TEST_CASE("new tokens of any number and width land behind every row", "[append_kv]") {
  for (const int32_t tokens : {1, 2, 7, 8, 9, 31, 128, 129, 512}) {
    for (const auto& [key_bytes, value_bytes] : {std::pair{2, 2}, {6, 16}, {160, 192}, {256, 256}, {1040, 16}}) {
      run({0, 5, 1, 3}, {tokens, tokens + 5, tokens + 9, tokens + 4}, 2, tokens, key_bytes, value_bytes);
    }
  }
}

TEST_CASE("several passes of a cluster, and more tokens than a cluster takes", "[append_kv]") {
  for (const int32_t tokens : {513, 600, 1024, 1100}) {
    run({0, 5, 1, 3}, {tokens, tokens + 5, tokens + 9, tokens + 4}, 2, tokens, 256, 256);
    run({0, 9, 1, 3}, {tokens, tokens + 5, tokens + 9, tokens + 4}, 2, tokens, 256, 256,
        static_cast<int32_t>(DeviceError::append_kv_no_room));
  }
}

TEST_CASE("4096 rows, one token and many", "[append_kv]") {
  for (const int32_t tokens : {1, 20}) {
    std::vector<int32_t> lengths(4096), rooms(4096);
    for (int32_t r = 0; r < 4096; ++r) {
      lengths[r] = r % 5;
      rooms[r] = lengths[r] + tokens + r % 2;
    }
    run(lengths, rooms, 8, tokens, 256, 256);
  }
}

TEST_CASE("a row without room keeps every byte and is noted", "[append_kv]") {
  const int32_t code = static_cast<int32_t>(DeviceError::append_kv_no_room);
  for (const int32_t tokens : {1, 3, 40}) run({2, 2, 0, 1}, {2, 2 + tokens, tokens - 1, 60}, 4, tokens, 256, 64, code);
}
