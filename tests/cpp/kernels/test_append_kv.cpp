// SPDX-License-Identifier: Apache-2.0
// The launch itself: one warp or several a row, every access width, guard bands, rows that have no room.
#include "kernels/append_kv.h"

#include <algorithm>
#include <numeric>
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

struct Problem {
  std::vector<int32_t> lengths, rooms;
  int32_t heads, tokens, key_bytes, value_bytes;
};

/// New tokens and an arena on the device; `launch` appends to rows of the first lengths, however often it is called.
class Append {
 public:
  explicit Append(const Problem& p)
      : p_(p),
        num_rows_(static_cast<int32_t>(p.lengths.size())),
        from_key_(numbered_bytes(size_t(p.heads) * p.tokens * p.key_bytes, 1)),
        from_value_(numbered_bytes(size_t(p.heads) * p.tokens * p.value_bytes, 2)),
        starts_(starts_of(p.rooms)),
        positions_(positions_of(p.tokens)),
        key_(from_key_),
        value_(from_value_),
        key_rows_(size_t(starts_.back()) * p.key_bytes),
        value_rows_(size_t(starts_.back()) * p.value_bytes),
        position_(positions_),
        count_(std::vector<int32_t>{p.tokens}),
        row_start_(starts_),
        first_len_(p.lengths),
        row_len_(p.lengths),
        slot_position_(starts_.back()) {
    params_.key = key_.data();
    params_.value = value_.data();
    params_.key_stride = {0, int64_t{p.tokens} * p.key_bytes, p.key_bytes};
    params_.value_stride = {0, int64_t{p.tokens} * p.value_bytes, p.value_bytes};
    params_.position = position_.data();
    params_.valid = {nullptr, nullptr, p.tokens};
    params_.row_len = row_len_.data();
    params_.rows = {row_start_.data(), params_.row_len, starts_.back(), num_rows_};
    params_.key_rows = key_rows_.data();
    params_.value_rows = value_rows_.data();
    params_.slot_position = slot_position_.data();
    params_.sources = {num_rows_, p.heads};
    params_.key_bytes = p.key_bytes;
    params_.value_bytes = p.value_bytes;
    params_.lane_bytes = common_lane_bytes({p.key_bytes, p.value_bytes});
  }

  void append(cudaStream_t stream) { cuda_ok(kernels::append_kv(params_, stream)); }
  void launch(cudaStream_t stream) {
    cuda_ok(cudaMemcpyAsync(row_len_.data(), first_len_.data(), p_.lengths.size() * sizeof(int32_t),
                            cudaMemcpyDeviceToDevice, stream));
    append(stream);
  }
  void poison() {
    key_rows_.fill(DeviceArray<char>::kPoison);
    value_rows_.fill(DeviceArray<char>::kPoison);
    slot_position_.fill(DeviceArray<char>::kPoison);
    row_len_.fill(DeviceArray<char>::kPoison);
  }
  Bytes results() const { return contents(key_rows_, value_rows_, slot_position_, row_len_); }

  /// Other lengths of the rows and fewer new tokens for the launches to come.
  void change(const std::vector<int32_t>& lengths, int32_t count) {
    p_.lengths = lengths;
    p_.tokens = count;
    first_len_.assign(lengths);
    count_.assign({count});
    params_.valid.length = count_.data();
  }

  /// Every byte of the arena after `appends` of them over poison.
  void check(int32_t appends = 1) const {
    std::vector<char> want_key(key_rows_.size(), kPoison), want_value(value_rows_.size(), kPoison);
    std::vector<int32_t> want_position = DeviceArray<int32_t>(slot_position_.size()).host(), want_len = p_.lengths;
    for (int32_t r = 0; r < num_rows_; ++r) {
      const int64_t head = params_.sources.kv_head(r);
      for (int32_t i = 0; i < appends && want_len[r] + p_.tokens <= p_.rooms[r]; ++i) {
        const int64_t slot = int64_t{starts_[r]} + want_len[r], token = head * params_.valid.seq_len;
        std::copy_n(from_key_.begin() + token * p_.key_bytes, size_t(p_.tokens) * p_.key_bytes,
                    want_key.begin() + slot * p_.key_bytes);
        std::copy_n(from_value_.begin() + token * p_.value_bytes, size_t(p_.tokens) * p_.value_bytes,
                    want_value.begin() + slot * p_.value_bytes);
        std::copy_n(positions_.begin(), p_.tokens, want_position.begin() + slot);
        want_len[r] += p_.tokens;
      }
    }
    INFO("tokens " << p_.tokens << " bytes " << p_.key_bytes << ", " << p_.value_bytes);
    REQUIRE(row_len_.host() == want_len);
    REQUIRE((slot_position_.host() == want_position));
    REQUIRE((key_rows_.host() == want_key));
    REQUIRE((value_rows_.host() == want_value));
    REQUIRE((key_rows_.guards_intact() && value_rows_.guards_intact()));
    REQUIRE((slot_position_.guards_intact() && row_len_.guards_intact()));
  }

 private:
  static constexpr char kPoison = static_cast<char>(DeviceArray<char>::kPoison);
  static std::vector<int32_t> starts_of(const std::vector<int32_t>& rooms) {
    std::vector<int32_t> starts{0};
    for (const int32_t room : rooms) starts.push_back(starts.back() + room);
    return starts;
  }
  static std::vector<int32_t> positions_of(int32_t tokens) {
    std::vector<int32_t> positions(tokens);
    std::iota(positions.begin(), positions.end(), 1000);
    return positions;
  }

  Problem p_;
  int32_t num_rows_;
  std::vector<char> from_key_, from_value_;
  std::vector<int32_t> starts_, positions_;
  DeviceArray<char> key_, value_, key_rows_, value_rows_;
  DeviceArray<int32_t> position_, count_, row_start_, first_len_, row_len_, slot_position_;
  kernels::AppendKvParams params_{};
};

/// One launch: every byte of the arena, and the error code that it notes.
void run(const Problem& p, int32_t wanted_code = 0) {
  Append call(p);
  call.append(nullptr);
  int32_t code = 0;
  cuda_ok(kernels::take_error(&code));
  REQUIRE(code == wanted_code);
  call.check();
}

/// Rows with room for `tokens` more and a few: one warp a row, a cluster a row, or a launch of its own for row_len.
Problem rows_for(int32_t tokens, size_t rows) {
  Problem p{std::vector<int32_t>(rows), std::vector<int32_t>(rows), 2, tokens, 256, 64};
  for (size_t r = 0; r < rows; ++r) {
    p.lengths[r] = static_cast<int32_t>(r * 5 % 17);
    p.rooms[r] = p.lengths[r] + tokens + static_cast<int32_t>(r % 3);
  }
  return p;
}

}  // namespace

TEST_CASE("new tokens of any number and width land behind every row", "[append_kv]") {
  for (const int32_t tokens : {1, 2, 7, 8, 9, 31, 128, 129, 512}) {
    for (const auto& [key_bytes, value_bytes] : {std::pair{2, 2}, {6, 16}, {160, 192}, {256, 256}, {1040, 16}}) {
      run({{0, 5, 1, 3}, {tokens, tokens + 5, tokens + 9, tokens + 4}, 2, tokens, key_bytes, value_bytes});
    }
  }
}

TEST_CASE("several passes of a cluster, and more tokens than a cluster takes", "[append_kv]") {
  for (const int32_t tokens : {513, 600, 1024, 1100}) {
    run({{0, 5, 1, 3}, {tokens, tokens + 5, tokens + 9, tokens + 4}, 2, tokens, 256, 256});
    run({{0, 9, 1, 3}, {tokens, tokens + 5, tokens + 9, tokens + 4}, 2, tokens, 256, 256},
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
    run({lengths, rooms, 8, tokens, 256, 256});
  }
}

TEST_CASE("a row without room keeps every byte and is noted", "[append_kv]") {
  const int32_t code = static_cast<int32_t>(DeviceError::append_kv_no_room);
  for (const int32_t tokens : {1, 3, 40})
    run({{2, 2, 0, 1}, {2, 2 + tokens, tokens - 1, 60}, 4, tokens, 256, 64}, code);
}

TEST_CASE("appends in a row and on three streams at once repeat every byte", "[append_kv][large]") {
  Append one_token(rows_for(1, 64)), clusters(rows_for(129, 8)), long_rows(rows_for(1100, 4));
  for (Append* call : {&one_token, &clusters, &long_rows}) require_repeats(*call, 10000, 100);
  require_apart(100, 100, one_token, clusters, long_rows);
  for (const Append* call : {&one_token, &clusters, &long_rows}) call->check();
}

TEST_CASE("one captured graph of appends follows lengths that change", "[append_kv][large]") {
  for (const int32_t tokens : {1, 129, 1100}) {
    const size_t rows = tokens == 1 ? 200 : 4;
    const Problem p = rows_for(tokens, rows);
    Append call(p);
    call.change(p.lengths, tokens);
    std::mt19937 random(3);
    const auto change = [&](int) {
      const int32_t count = static_cast<int32_t>(random() % static_cast<uint32_t>(tokens + 1));
      std::vector<int32_t> lengths(rows);
      for (size_t r = 0; r < rows; ++r)
        lengths[r] = static_cast<int32_t>(random() % static_cast<uint32_t>(p.rooms[r] - count + 1));
      call.change(lengths, count);
    };
    require_graph_follows(call, 100, change, [&](int) { call.check(); });
  }
}

// Each append finds the lengths that the one before it left: rows grow until the last append has no room in one.
TEST_CASE("thousands of appends in a row fill the rows", "[append_kv][large]") {
  for (const int32_t tokens : {1, 5, 513}) {
    const int32_t appends = tokens == 1 ? 10000 : tokens == 5 ? 2000 : 100;
    Append call({{0, 7, 3, 1}, std::vector<int32_t>(4, appends * tokens + 7), 2, tokens, 16, 66});
    const Stream stream;
    for (int i = 0; i <= appends; ++i) call.append(stream);
    call.check(appends + 1);
    int32_t code = 0;
    cuda_ok(kernels::take_error(&code));
    REQUIRE(code == static_cast<int32_t>(DeviceError::append_kv_no_room));
  }
}
