// SPDX-License-Identifier: Apache-2.0
// The launches themselves against a plain loop: block borders, skewed rows, group sizes, every tile, guard bands,
// repeated bits.
#include "kernels/decode_attention/decode_attention.h"

#include <cmath>
#include <memory>
#include <random>

#include "support/attention.hpp"
#include "support/device.hpp"
#include "support/repeat.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

struct Problem {
  std::vector<int32_t> len;
  int32_t batch = 1, group = 4, key_dim = 64, value_dim = 64, spare = 3;
  DType dtype = DType::float16;
};

/// A problem on the device; `launch` may be called as often as wanted, also with other lengths.
class Decode {
 public:
  explicit Decode(const Problem& p)
      : problem_(p),
        packed_(p.len, p.spare, p.key_dim, p.value_dim, p.dtype),
        query_(random_numbers(p.len.size() * p.group * p.key_dim, p.dtype, 1)),
        q_(encoded(query_, p.dtype)),
        k_(encoded(packed_.key, p.dtype)),
        v_(encoded(packed_.value, p.dtype)),
        out_(p.len.size() * p.group * p.value_dim * dtype_bytes(p.dtype)),
        lse_(p.len.size() * p.group),
        starts_(packed_.start),
        lens_(p.len) {
    const int32_t rows = static_cast<int32_t>(p.len.size()), per_sequence = rows / p.batch;
    params_.query = q_.data();
    params_.query_batch_stride = int64_t{per_sequence} * p.group * p.key_dim;
    params_.query_head_stride = p.key_dim;
    params_.key_rows = k_.data();
    params_.value_rows = v_.data();
    params_.rows = {starts_.data(), lens_.data(), packed_.slots, rows};
    params_.out = out_.data();
    params_.lse = lse_.data();
    params_.rows_per_sequence = per_sequence;
    params_.group_size = p.group;
    params_.key_dim = p.key_dim;
    params_.value_dim = p.value_dim;
    params_.scale = 1.0f / std::sqrt(static_cast<float>(p.key_dim));
    params_.dtype = p.dtype;
    int64_t bytes = 0;
    cuda_ok(kernels::decode_attention_workspace_bytes(params_, &bytes));
    work_ = std::make_unique<DeviceArray<unsigned char>>(static_cast<size_t>(bytes));
  }

  void launch(cudaStream_t stream = nullptr) { cuda_ok(kernels::decode_attention(params_, work_->data(), stream)); }
  void set_lengths(const std::vector<int32_t>& len) {
    problem_.len = len;
    lens_.assign(len);
  }
  /// Fills what a launch writes; NaN as the workspace's floats.
  void poison() {
    work_->fill(0xFF);
    out_.fill(0x5A);
    lse_.fill(0x5A);
  }
  Bytes results() const { return contents(out_, lse_); }
  bool guards_intact() const { return out_.guards_intact() && lse_.guards_intact() && work_->guards_intact(); }

  void compare() const {
    const Problem& p = problem_;
    const std::vector<float> got = decoded(out_.host(), p.dtype), got_lse = lse_.host();
    AttentionOracle oracle(p.key_dim, p.value_dim, params_.scale, p.dtype);
    for (size_t i = 0; i < got_lse.size(); ++i) {
      const int32_t r = static_cast<int32_t>(i) / p.group;
      oracle.begin(&query_[i * p.key_dim]);
      oracle.see_row(packed_, r, p.len[r]);
      oracle.compare(&got[i * p.value_dim], got_lse[i], i);
    }
    oracle.check_all();
  }

 private:
  Problem problem_;
  PackedRows packed_;
  std::vector<float> query_;
  DeviceArray<unsigned char> q_, k_, v_, out_;
  DeviceArray<float> lse_;
  DeviceArray<int32_t> starts_, lens_;
  std::unique_ptr<DeviceArray<unsigned char>> work_;
  kernels::DecodeAttentionParams params_{};
};

void run(const Problem& p) {
  CAPTURE(p.group, p.key_dim, p.value_dim, static_cast<int>(p.dtype), p.len.size());
  Decode decode(p);
  decode.poison();
  decode.launch();
  REQUIRE(decode.guards_intact());
  const Bytes first = decode.results();
  decode.launch();
  REQUIRE((decode.results() == first));
  decode.compare();
}

/// Lengths whose sum is `total`, some of them 0, the first of them long.
std::vector<int32_t> skewed(size_t rows, int32_t total, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> len(rows);
  for (size_t r = 1; r < rows; ++r) {
    len[r] = random() % 5 == 0 ? 0 : static_cast<int32_t>(random() % (total / (2 * rows)));
    total -= len[r];
  }
  len[0] = total;
  return len;
}

}  // namespace

TEST_CASE("block borders, empty rows and skew", "[decode_attention]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    run({.len = {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300}, .batch = 3, .dtype = dtype});
    run({.len = {1, 20000, 1, 0, 2, 700}, .batch = 2, .dtype = dtype});
    run({.len = {0, 0}, .dtype = dtype});
  }
  run({.len = {3, 45000}, .group = 2, .key_dim = 64, .value_dim = 40});  // more parts than are read at once
}

TEST_CASE("every tile and unequal head dims", "[decode_attention]") {
  const std::vector<std::pair<int32_t, int32_t>> dims = {{8, 8},     {64, 32},  {80, 80},   {96, 128},
                                                         {128, 128}, {40, 200}, {256, 256}, {256, 16}};
  for (const auto& [key_dim, value_dim] : dims) {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
      run({.len = {70, 1000}, .group = 4, .key_dim = key_dim, .value_dim = value_dim, .dtype = dtype});
      run({.len = {70, 1000}, .group = 13, .key_dim = key_dim, .value_dim = value_dim, .dtype = dtype});
    }
  }
}

TEST_CASE("group sizes 1 to 16", "[decode_attention]") {
  for (int32_t group = 1; group <= 16; ++group)
    run({.len = {5, 400, 33, 1}, .batch = 2, .group = group, .key_dim = 128, .value_dim = 128});
}

TEST_CASE("one row of many slots and many rows of few", "[decode_attention][large]") {
  run({.len = {1000000}, .group = 2, .key_dim = 64, .value_dim = 64, .spare = 0});
  std::vector<int32_t> lengths(4096);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = static_cast<int32_t>(i * 37 % 150);
  run({.len = lengths, .batch = 512, .group = 2});
}

TEST_CASE("few rows of a small arena, and the first that are too many or too large", "[decode_attention]") {
  for (const size_t rows : {1, 2, 8, 9, 16, 17}) {
    run({.len = skewed(rows, 3000, 3), .key_dim = 128, .value_dim = 128});
    run({.len = skewed(rows, 3000, 4), .group = 7, .key_dim = 40, .value_dim = 56, .dtype = DType::bfloat16});
  }
  run({.len = {16384}, .group = 1, .spare = 0});
  run({.len = {16385}, .group = 1, .spare = 0});
  run({.len = {0, 1, 15, 16, 17, 255, 256, 257}, .batch = 2, .group = 8, .key_dim = 128, .value_dim = 64});
  run({.len = {0, 0, 0, 0}, .key_dim = 128, .value_dim = 128});
}

TEST_CASE("as many rows as workers, one less, one more", "[decode_attention]") {
  int sms = 0;
  cuda_ok(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  for (const int rows : {2 * sms - 1, 2 * sms, 2 * sms + 1}) {
    run({.len = std::vector<int32_t>(rows, 130), .group = 2});
    run({.len = skewed(rows, 300 * rows, 5), .group = 2});
  }
}

TEST_CASE("10000 launches in a row and two streams at once give the first bits", "[decode_attention][large]") {
  Decode small({.len = {500, 30, 0, 900}, .key_dim = 128, .value_dim = 128});
  Decode split({.len = skewed(20, 30000, 6), .key_dim = 128, .value_dim = 128});
  for (Decode* decode : {&small, &split}) {
    require_repeats(*decode, 10000, 1);
    decode->compare();
  }
  require_apart(100, 20, small, split);
}

TEST_CASE("one captured graph follows lengths that change", "[decode_attention][large]") {
  for (const size_t rows : {8, 20, 600}) {
    const int32_t total = rows == 8 ? 16000 : 50000;
    Decode decode({.len = std::vector<int32_t>(rows, total / static_cast<int32_t>(rows)), .spare = 0});
    std::mt19937 random(8);
    const auto change = [&](int) {
      std::vector<int32_t> len(rows);
      for (int32_t& n : len)
        n = static_cast<int32_t>(random() % (total / rows + 1)) * static_cast<int32_t>(random() % 2);
      decode.set_lengths(len);
    };
    require_graph_follows(decode, 100, change, [&](int step) {
      if (step % 20 == 0) decode.compare();
    });
  }
}

namespace {

void check_skew(size_t rows, int32_t total, unsigned seed, int runs) {
  Decode decode({.len = skewed(rows, total, seed), .group = 2, .dtype = DType::bfloat16});
  require_repeats(decode, 1, runs);
  decode.compare();
}

}  // namespace

TEST_CASE("random skew, run for run the same bits", "[decode_attention]") {
  check_skew(8, 4000, 1, 10);
  check_skew(300, 9000, 2, 10);
}

TEST_CASE("random skew of many seeds, 100 runs bit for bit", "[decode_attention][large]") {
  for (unsigned seed = 0; seed < 6; ++seed) check_skew(seed < 3 ? 8 : 300, 120000, seed, 100);
}
