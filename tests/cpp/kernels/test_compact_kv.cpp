// SPDX-License-Identifier: Apache-2.0
// The launch itself: rows of all lengths, every access width, guard bands, untouched dead slots, the error word.
#include "kernels/compact_kv.h"

#include <random>

#include "core/errors.h"
#include "core/lanes.h"
#include "kernels/runtime.h"
#include "support/catch.hpp"
#include "support/device.hpp"
#include "support/repeat.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

constexpr int32_t kBatch = 2, kHeads = 2, kSeqLen = 400;

/// Dense sources, a layout with one spare slot behind each row, and what the slots must hold.
struct Setup {
  Setup(std::vector<int32_t> lengths, int32_t key_bytes, int32_t value_bytes)
      : num_rows(static_cast<int32_t>(lengths.size())), key_bytes(key_bytes), value_bytes(value_bytes) {
    for (int32_t r = 0; r < num_rows; ++r) {
      for (int32_t i = 0; i < lengths[r]; ++i) index.push_back((i * 37 + r * 11) % kSeqLen);
      index_start.push_back(static_cast<int32_t>(index.size()));
      row_start.push_back(row_start.back() + lengths[r] + 1);
    }
    capacity = row_start.back();
    key = numbered_bytes(size_t{kBatch} * kHeads * kSeqLen * key_bytes, 1);
    value = numbered_bytes(size_t{kBatch} * kHeads * kSeqLen * value_bytes, 2);
  }

  int32_t num_rows, key_bytes, value_bytes, capacity = 0;
  std::vector<int32_t> index, index_start{0}, row_start{0};
  std::vector<char> key, value;
};

void check_rows(const Setup& s, const std::vector<char>& got, const std::vector<char>& source, int32_t bytes) {
  const RowSources sources{s.num_rows / kBatch, kHeads};
  for (int32_t r = 0; r < s.num_rows; ++r) {
    const int64_t plane = (sources.sequence(r) * kHeads + sources.kv_head(r)) * int64_t{kSeqLen};
    const int32_t count = s.index_start[r + 1] - s.index_start[r];
    for (int32_t i = 0; i <= count; ++i) {
      for (int32_t b = 0; b < bytes; ++b) {
        const char have = got[(int64_t{s.row_start[r]} + i) * bytes + b];
        const char want = i == count ? static_cast<char>(DeviceArray<char>::kPoison)
                                     : source[(plane + s.index[s.index_start[r] + i]) * bytes + b];
        if (have != want) FAIL("row " << r << " token " << i << " byte " << b << " of " << bytes);
      }
    }
  }
}

/// A setup on the device; `launch` may be called as often as wanted.
struct Compact {
  DeviceArray<char> key, value, key_rows, value_rows;
  DeviceArray<int32_t> index, index_start, row_start, row_len, slot_position;
  kernels::CompactKvParams params{};

  explicit Compact(const Setup& s)
      : key(s.key),
        value(s.value),
        key_rows(size_t(s.capacity) * s.key_bytes),
        value_rows(size_t(s.capacity) * s.value_bytes),
        index(s.index),
        index_start(s.index_start),
        row_start(s.row_start),
        row_len(s.num_rows),
        slot_position(s.capacity) {
    params.key = key.data();
    params.value = value.data();
    params.key_stride = {int64_t{kHeads} * kSeqLen * s.key_bytes, int64_t{kSeqLen} * s.key_bytes, s.key_bytes};
    params.value_stride = {int64_t{kHeads} * kSeqLen * s.value_bytes, int64_t{kSeqLen} * s.value_bytes, s.value_bytes};
    params.index = index.data();
    params.index_start = index_start.data();
    params.rows = {row_start.data(), nullptr, s.capacity, s.num_rows};
    params.row_len = row_len.data();
    params.key_rows = key_rows.data();
    params.value_rows = value_rows.data();
    params.slot_position = slot_position.data();
    params.sources = {s.num_rows / kBatch, kHeads};
    params.seq_len = kSeqLen;
    params.total = static_cast<int32_t>(s.index.size());
    params.key_bytes = s.key_bytes;
    params.value_bytes = s.value_bytes;
    params.lane_bytes = common_lane_bytes({s.key_bytes, s.value_bytes});
  }

  void launch(cudaStream_t stream) { cuda_ok(kernels::compact_kv(params, stream)); }
  void poison() {
    key_rows.fill(DeviceArray<char>::kPoison);
    value_rows.fill(DeviceArray<char>::kPoison);
    row_len.fill(DeviceArray<char>::kPoison);
    slot_position.fill(DeviceArray<char>::kPoison);
  }
  Bytes results() const { return contents(key_rows, value_rows, row_len, slot_position); }

  /// The results of the last launch against the setup.
  void check(const Setup& s) const {
    check_rows(s, key_rows.host(), s.key, s.key_bytes);
    check_rows(s, value_rows.host(), s.value, s.value_bytes);
    const std::vector<int32_t> lengths = row_len.host(), positions = slot_position.host();
    for (int32_t r = 0; r < s.num_rows; ++r) {
      REQUIRE(lengths[r] == s.index_start[r + 1] - s.index_start[r]);
      for (int32_t i = 0; i < lengths[r]; ++i) {
        if (positions[s.row_start[r] + i] != s.index[s.index_start[r] + i])
          FAIL("position of row " << r << " token " << i);
      }
    }
    REQUIRE((key_rows.guards_intact() && value_rows.guards_intact()));
    REQUIRE((slot_position.guards_intact() && row_len.guards_intact()));
  }
};

void run(const Setup& s, int32_t wanted_code) {
  Compact call(s);
  call.launch(nullptr);
  int32_t code = 0;
  cuda_ok(kernels::take_error(&code));
  REQUIRE(code == wanted_code);
  if (wanted_code == 0) call.check(s);
}

/// Row r keeps up to `longest` tokens.
std::vector<int32_t> lengths_up_to(size_t rows, int32_t longest) {
  std::vector<int32_t> lengths(rows);
  for (size_t r = 0; r < rows; ++r) lengths[r] = static_cast<int32_t>(r * 7 % (longest + 1));
  return lengths;
}

}  // namespace

TEST_CASE("rows of any length and width arrive bit-equal; spare slots keep their poison", "[compact_kv]") {
  for (const auto& [key_bytes, value_bytes] :
       {std::pair{2, 2}, {6, 16}, {20, 40}, {160, 192}, {256, 256}, {256, 48}, {512, 1024}, {1040, 16}}) {
    run(Setup({0, 1, 400, 7, 8, 9, 63, 64}, key_bytes, value_bytes), 0);
    run(Setup({300, 0, 0, 0}, key_bytes, value_bytes), 0);
  }
}

TEST_CASE("many rows, several of them for each KV head", "[compact_kv]") {
  run(Setup(lengths_up_to(4096, 22), 32, 16), 0);
}

TEST_CASE("rows of any skew, few whose passes are dealt out and many that get equally many warps", "[compact_kv]") {
  for (const int32_t rows : {4, 28, 32, 36, 200}) {
    std::vector<int32_t> lengths(rows);
    for (int32_t r = 0; r < rows; ++r) lengths[r] = r % 67 == 5 ? 3 : 0;
    run(Setup(lengths, 256, 256), 0);
    lengths[rows - 1] = 350;
    lengths[rows / 2] = 1;
    run(Setup(lengths, 256, 256), 0);
    run(Setup(std::vector<int32_t>(rows, 0), 256, 256), 0);
  }
}

TEST_CASE("a chain of launches, each of which reads what the one before wrote", "[compact_kv]") {
  constexpr int32_t kBytes = 256, kHops = 200;
  const std::vector<int32_t> lengths{400, 1, 0, 77, 300, 8, 9, 200};
  std::vector<int32_t> index, start{0};
  for (const int32_t length : lengths) {
    for (int32_t i = 0; i < length; ++i) index.push_back(length - 1 - i);
    start.push_back(static_cast<int32_t>(index.size()));
  }
  const int32_t slots = start.back(), rows = static_cast<int32_t>(lengths.size());
  const std::vector<char> key = numbered_bytes(size_t(slots) * kBytes, 1),
                          value = numbered_bytes(size_t(slots) * kBytes, 2);
  std::vector<int32_t> numbers(slots);
  for (int32_t i = 0; i < slots; ++i) numbers[i] = 7 * i;
  DeviceArray<char> keys[2]{DeviceArray<char>(key), DeviceArray<char>(key)};
  DeviceArray<char> values[2]{DeviceArray<char>(value), DeviceArray<char>(value)};
  DeviceArray<int32_t> positions[2]{DeviceArray<int32_t>(numbers), DeviceArray<int32_t>(numbers)};
  DeviceArray<int32_t> indices(index), starts(start), row_len(rows);
  // Every hop turns the rows round; an even number of them leaves all as it was.
  for (int32_t hop = 0; hop < kHops; ++hop) {
    const int from = hop % 2, to = 1 - from;
    kernels::CompactKvParams params{};
    params.key = keys[from].data();
    params.value = values[from].data();
    params.position = positions[from].data();
    params.key_stride = params.value_stride = {0, 0, kBytes};
    params.source_start = starts.data();
    params.index = indices.data();
    params.index_start = starts.data();
    params.rows = {starts.data(), nullptr, slots, rows};
    params.row_len = row_len.data();
    params.key_rows = keys[to].data();
    params.value_rows = values[to].data();
    params.slot_position = positions[to].data();
    params.source_slots = slots;
    params.total = slots;
    params.key_bytes = params.value_bytes = kBytes;
    params.lane_bytes = 16;
    cuda_ok(kernels::compact_kv(params, nullptr));
  }
  int32_t code = 0;
  cuda_ok(kernels::take_error(&code));
  REQUIRE(code == 0);
  REQUIRE((keys[0].host() == key && values[0].host() == value));
  REQUIRE(positions[0].host() == numbers);
  REQUIRE(keys[1].host() != key);
}

TEST_CASE("an index outside and a row without room are noted", "[compact_kv]") {
  Setup outside({3, 3, 3, 3}, 256, 256);
  outside.index[4] = kSeqLen;
  run(outside, static_cast<int32_t>(DeviceError::compact_kv_index));
  Setup full({3, 3, 3, 3}, 256, 256);
  full.row_start = {0, 4, 6, 12, 16};
  run(full, static_cast<int32_t>(DeviceError::compact_kv_no_room));
}

TEST_CASE("compactions in a row and on three streams at once repeat every byte", "[compact_kv][large]") {
  const Setup of_long({400, 1, 0, 399}, 256, 256), of_many(lengths_up_to(600, 22), 160, 48),
      of_odd({300, 7, 0, 65}, 2, 6);
  Compact a(of_long), b(of_many), c(of_odd);
  for (Compact* call : {&a, &b, &c}) require_repeats(*call, 10000, 100);
  require_apart(100, 100, a, b, c);
  a.check(of_long);
  b.check(of_many);
  c.check(of_odd);
}

TEST_CASE("one captured graph of compactions follows lengths that change", "[compact_kv][large]") {
  for (const size_t rows : {4, 200}) {
    Setup s(rows == 4 ? std::vector<int32_t>{400, 128, 129, 399} : lengths_up_to(rows, 60), 256, 128);
    const std::vector<int32_t> most = s.index_start;
    Compact call(s);
    std::mt19937 random(3);
    const auto change = [&](int) {
      for (size_t r = 0; r < rows; ++r) {
        const uint32_t room = static_cast<uint32_t>(most[r + 1] - most[r]);
        s.index_start[r + 1] = s.index_start[r] + static_cast<int32_t>(random() % (room + 1));
      }
      call.index_start.assign(s.index_start);
    };
    require_graph_follows(call, 100, change, [&](int) { call.check(s); });
  }
}
