// SPDX-License-Identifier: Apache-2.0
// Launches over latents against a plain loop over keys made in double: every tile, partial rotation, offsets, guard
// bands, repeated bits, graphs.
#include <cmath>
#include <memory>
#include <optional>
#include <random>

#include "kernels/decode_attention/decode_attention.h"
#include "support/attention.hpp"
#include "support/device.hpp"
#include "support/evict_device.hpp"
#include "support/repeat.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

struct Problem {
  std::vector<int32_t> len;
  int32_t batch = 1, group = 4, rank = 64, dim = 128, value_dim = 64, spare = 3, pairs = 64;
  int32_t run = 0;  // positions that follow one another before a gap; 0: all are random
  bool bias = true, norm = false, offset = false;
  float rotary_scale = 1.0f;
  DType dtype = DType::bfloat16;
};

/// A transform on the device, and the keys that it makes.
struct Transform {
  std::vector<float> basis, bias, norm, frequency;
  std::vector<int32_t> offset;
  DeviceArray<unsigned char> basis_;
  DeviceArray<float> bias_, norm_, frequency_;
  DeviceArray<int32_t> offset_;
  kernels::KeyTransformParams params{};
  int32_t rank;

  Transform(int32_t heads, int32_t batch, int32_t rows_per_kv, const Problem& p)
      : basis(random_numbers(static_cast<size_t>(heads) * p.rank * p.dim, p.dtype, 11)),
        bias(random_numbers(static_cast<size_t>(heads) * p.dim, DType::float32, 12)),
        norm(random_numbers(p.dim, DType::float32, 13)),
        frequency(p.pairs),
        offset(batch),
        basis_((scale_basis(p), encoded(basis, p.dtype))),
        bias_(bias),
        norm_(norm),
        frequency_((fill_frequency(p.dim), frequency)),
        offset_((fill_offset(), offset)),
        rank(p.rank) {
    params.basis = basis_.data();
    params.bias = p.bias ? bias_.data() : nullptr;
    params.norm = p.norm ? norm_.data() : nullptr;
    params.frequency = frequency_.data();
    params.position_offset = p.offset ? offset_.data() : nullptr;
    params.dim = p.dim;
    params.pairs = p.pairs;
    params.rows_per_kv = rows_per_kv;
    params.norm_eps = 1e-5f;
    params.rotary_scale = p.rotary_scale;
  }

  /// Key of a latent, rounded as the products round it.
  void make(const float* latent, int32_t head, int64_t position, int32_t sequence, DType dtype, float* key) const {
    const int32_t dim = params.dim, pairs = params.pairs;
    std::vector<double> x(dim, 0.0);
    double squares = 0.0;
    for (int32_t k = 0; k < rank; ++k) {
      const float* row = &basis[(static_cast<size_t>(head) * rank + k) * dim];
      for (int32_t d = 0; d < dim; ++d) x[d] += double{latent[k]} * row[d];
    }
    for (int32_t d = 0; d < dim; ++d) {
      if (params.bias != nullptr) x[d] += bias[static_cast<size_t>(head) * dim + d];
      squares += x[d] * x[d];
    }
    const double factor = params.norm == nullptr ? 1.0 : 1.0 / std::sqrt(squares / dim + params.norm_eps);
    for (int32_t d = 0; d < dim; ++d) x[d] *= params.norm == nullptr ? 1.0 : factor * norm[d];
    const int64_t at = position + (params.position_offset == nullptr ? 0 : offset[sequence]);
    for (int32_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(at) * frequency[i], a = x[i], b = x[i + pairs];
      x[i] = (a * std::cos(angle) - b * std::sin(angle)) * params.rotary_scale;
      x[i + pairs] = (b * std::cos(angle) + a * std::sin(angle)) * params.rotary_scale;
    }
    for (int32_t d = 0; d < dim; ++d) key[d] = rounded(static_cast<float>(x[d]), dtype);
  }

 private:
  int scale_basis(const Problem& p) {
    for (float& x : basis) x = rounded(x / std::sqrt(static_cast<float>(p.rank)), p.dtype);
    return 0;
  }
  int fill_frequency(int32_t dim) {
    for (size_t i = 0; i < frequency.size(); ++i) {
      frequency[i] = static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / dim));
    }
    return 0;
  }
  int fill_offset() {
    for (size_t b = 0; b < offset.size(); ++b) offset[b] = static_cast<int32_t>(b * 777) - 500;
    return 0;
  }
};

class Decode {
 public:
  explicit Decode(const Problem& p)
      : problem_(p),
        rows_(static_cast<int32_t>(p.len.size())),
        per_sequence_(rows_ / p.batch),
        packed_(p.len, p.spare, p.rank, p.value_dim, p.dtype),
        query_(random_numbers(p.len.size() * p.group * p.dim, p.dtype, 1)),
        position_(packed_.slots),
        transform_(per_sequence_, p.batch, 1, p),
        q_(encoded(query_, p.dtype)),
        k_(encoded(packed_.key, p.dtype)),
        v_(encoded(packed_.value, p.dtype)),
        out_(p.len.size() * p.group * p.value_dim * dtype_bytes(p.dtype)),
        lse_(p.len.size() * p.group),
        starts_(packed_.start),
        lens_(p.len),
        positions_((fill_positions(), position_)) {
    transform_.params.slot_position = positions_.data();
    params_.query = q_.data();
    params_.query_batch_stride = int64_t{per_sequence_} * p.group * p.dim;
    params_.query_head_stride = p.dim;
    params_.key_rows = k_.data();
    params_.value_rows = v_.data();
    params_.rows = {starts_.data(), lens_.data(), packed_.slots, rows_};
    params_.out = out_.data();
    params_.lse = lse_.data();
    params_.rows_per_sequence = per_sequence_;
    params_.group_size = p.group;
    params_.key_dim = p.rank;
    params_.value_dim = p.value_dim;
    params_.scale = 1.0f / std::sqrt(static_cast<float>(p.dim));
    params_.dtype = p.dtype;
    int64_t bytes = 0;
    cuda_ok(kernels::decode_attention_workspace_bytes(params_, &bytes, &transform_.params));
    work_ = std::make_unique<DeviceArray<unsigned char>>(static_cast<size_t>(bytes));
  }

  void launch(cudaStream_t stream = nullptr) {
    cuda_ok(kernels::decode_attention(params_, work_->data(), stream, &transform_.params));
  }
  void set_lengths(const std::vector<int32_t>& len) {
    problem_.len = len;
    lens_.assign(len);
  }
  void poison() {
    work_->fill(0xFF);
    out_.fill(0x5A);
    lse_.fill(0x5A);
  }
  Bytes results() const { return contents(out_, lse_); }
  bool guards_intact() const { return out_.guards_intact() && lse_.guards_intact() && work_->guards_intact(); }

  /// Out alone: the logarithm of a sum of few weights shows the rounding of single keys.
  void compare() const {
    const Problem& p = problem_;
    const std::vector<float> got = decoded(out_.host(), p.dtype), lse = lse_.host();
    double off = 0.0, norm = 0.0;
    for (int32_t r = 0; r < rows_; ++r) {
      std::vector<float> keys(static_cast<size_t>(p.len[r]) * p.dim);
      for (int32_t j = 0; j < p.len[r]; ++j) {
        const size_t slot = packed_.start[r] + j;
        transform_.make(&packed_.key[slot * p.rank], r % per_sequence_, position_[slot], r / per_sequence_, p.dtype,
                        &keys[static_cast<size_t>(j) * p.dim]);
      }
      for (int32_t h = 0; h < p.group; ++h) {
        const size_t head = static_cast<size_t>(r) * p.group + h;
        std::vector<double> logit(p.len[r], 0.0), sum(p.value_dim, 0.0);
        double top = -INFINITY, total = 0.0;
        for (int32_t j = 0; j < p.len[r]; ++j) {
          for (int32_t d = 0; d < p.dim; ++d) {
            logit[j] += double{query_[head * p.dim + d]} * keys[static_cast<size_t>(j) * p.dim + d];
          }
          logit[j] *= params_.scale;
          top = std::max(top, logit[j]);
        }
        for (int32_t j = 0; j < p.len[r]; ++j) {
          const double weight = std::exp(logit[j] - top);
          total += weight;
          const float* value = &packed_.value[(packed_.start[r] + j) * static_cast<size_t>(p.value_dim)];
          for (int32_t d = 0; d < p.value_dim; ++d) sum[d] += weight * value[d];
        }
        for (int32_t d = 0; d < p.value_dim; ++d) {
          const double want = p.len[r] == 0 ? 0.0 : sum[d] / total, error = got[head * p.value_dim + d] - want;
          off += error * error;
          norm += want * want;
        }
        if (p.len[r] == 0) {
          REQUIRE(lse[head] == -INFINITY);
        } else {
          REQUIRE(lse[head] == Approx(top + std::log(total)).margin(p.dtype == DType::float32 ? 1e-4 : 0.05));
        }
      }
    }
    const double bound = p.dtype == DType::float32 ? 2e-5 : p.dtype == DType::float16 ? 3e-3 : 1.5e-2;
    REQUIRE(std::sqrt(off) <= bound * std::sqrt(norm));
  }

 private:
  int fill_positions() {
    std::mt19937 random(4);
    for (int32_t& x : position_) x = static_cast<int32_t>(random() % 100000);
    for (size_t i = 0; problem_.run > 0 && i < position_.size(); ++i) {
      position_[i] = static_cast<int32_t>(5 + i + i / problem_.run * 37);
    }
    return 0;
  }

  Problem problem_;
  int32_t rows_, per_sequence_;
  PackedRows packed_;
  std::vector<float> query_;
  std::vector<int32_t> position_;
  Transform transform_;
  DeviceArray<unsigned char> q_, k_, v_, out_;
  DeviceArray<float> lse_;
  DeviceArray<int32_t> starts_, lens_, positions_;
  std::unique_ptr<DeviceArray<unsigned char>> work_;
  kernels::DecodeAttentionParams params_{};
};

void run(const Problem& p) {
  CAPTURE(p.group, p.rank, p.dim, p.value_dim, p.pairs, static_cast<int>(p.dtype), p.len.size());
  Decode decode(p);
  decode.poison();
  decode.launch();
  REQUIRE(decode.guards_intact());
  const Bytes first = decode.results();
  decode.launch();
  REQUIRE((decode.results() == first));
  decode.compare();
}

}  // namespace

TEST_CASE("latents: block borders, empty rows, skew", "[key_transform]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    run({.len = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300}, .batch = 3, .dtype = dtype});
    run({.len = {1, 2000, 1, 0, 2, 70}, .batch = 2, .offset = true, .dtype = dtype});
    run({.len = {0, 0}, .dtype = dtype});
  }
}

TEST_CASE("latents: positions that follow one another turn by a table", "[key_transform]") {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (const bool bias : {false, true}) {  // without: warpgroups where the device has them
      run({.len = {70, 500, 0, 900}, .batch = 2, .run = 1000000, .bias = bias, .offset = true, .dtype = dtype});
      run({.len = {120000, 7, 3000}, .group = 8, .run = 1700, .bias = bias, .dtype = dtype});
    }
  }
  run({.len = {100000}, .group = 3, .rank = 48, .value_dim = 40, .run = 5000, .bias = false});
  run({.len = {150000}, .group = 1, .dim = 96, .pairs = 40, .run = 20000, .norm = true, .rotary_scale = 1.2f});
}

TEST_CASE("latents: every tile, partial rotation, norm", "[key_transform]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const int32_t group : {1, 8, 13}) {
      run({.len = {70, 200}, .group = group, .rank = 16, .dim = 64, .value_dim = 64, .pairs = 32, .dtype = dtype});
      run({.len = {70, 200}, .group = group, .rank = 64, .dim = 128, .value_dim = 128, .dtype = dtype});
      run({.len = {70, 200}, .group = group, .rank = 112, .dim = 128, .value_dim = 40, .pairs = 16, .dtype = dtype});
      run({.len = {70, 200}, .group = group, .rank = 48, .dim = 80, .value_dim = 80, .pairs = 5, .dtype = dtype});
    }
    run({.len = {70, 200}, .rank = 128, .dim = 256, .value_dim = 256, .pairs = 128, .dtype = dtype});
    run({.len = {70, 200}, .pairs = 0, .bias = false, .dtype = dtype});
    run({.len = {70, 200}, .norm = true, .dtype = dtype});
    run({.len = {70, 200}, .rotary_scale = 1.3f, .dtype = dtype});
    run({.len = {70, 200}, .pairs = 20, .norm = true, .rotary_scale = 1.3f, .dtype = dtype});
    run({.len = {70, 200}, .pairs = 16, .rotary_scale = 1.3f, .dtype = dtype});
  }
}

TEST_CASE("latents: random skew, 100 runs bit for bit", "[key_transform][large]") {
  for (const size_t rows : {8, 300}) {
    std::vector<int32_t> len(rows);
    for (size_t r = 0; r < rows; ++r) len[r] = static_cast<int32_t>(r * 37 % 150);
    len[rows / 2] = 20000;
    Decode decode({.len = len, .group = 2});
    require_repeats(decode, 100, 100);
  }
}

TEST_CASE("latents: one captured graph follows lengths that change", "[key_transform][large]") {
  for (const size_t rows : {8, 600}) {
    const int32_t most = rows == 8 ? 400 : 60;
    Decode decode({.len = std::vector<int32_t>(rows, most), .spare = 0});
    std::mt19937 random(8);
    const auto change = [&](int) {
      std::vector<int32_t> len(rows);
      for (int32_t& n : len) n = static_cast<int32_t>(random() % (most + 1)) * static_cast<int32_t>(random() % 2);
      decode.set_lengths(len);
    };
    require_graph_follows(decode, 40, change, [&](int step) {
      if (step % 20 == 0) decode.compare();
    });
  }
}

TEST_CASE("latents: a step stores the latent, votes repeat bit for bit", "[key_transform]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    const Problem made{.len = {}, .bias = true, .norm = true, .dtype = dtype};
    EvictProblem p{.len = {300, 5, 1552, 40}, .room = {300, 5, 1552, 40}, .batch = 2, .num_kv_heads = 2};
    p.key_dim = made.dim;  // EvictInput draws queries and keys of one width
    p.value_dim = made.value_dim;
    p.dtype = dtype;
    const EvictInput in(p);
    const auto step = [&] {
      EvictOnDevice call(p, in);
      Transform transform(2, 2, 1, made);
      call.params.key_dim = made.rank;  // of the same bytes, twice as many slots as are used
      call.params.key_head = made.rank;
      call.params.key_batch = 2 * made.rank;
      DeviceArray<unsigned char> work(static_cast<size_t>(call.bytes));
      work.fill(0xFF);
      cuda_ok(kernels::decode_evict(call.params, work.data(), nullptr, &transform.params));
      REQUIRE(work.guards_intact());
      return call.host();
    };
    const EvictOutput first = step();
    require_same(step(), first);
    const size_t bytes = made.rank * dtype_bytes(dtype);
    const std::vector<unsigned char> keys = encoded(in.new_key, dtype);
    for (int32_t r = 0; r < 4; ++r) {
      int32_t found = 0;
      for (int32_t s = in.start[r]; s < in.start[r] + first.state.row_len[r]; ++s) {
        if (first.state.position[s] != in.new_position[0]) continue;
        ++found;
        REQUIRE(
            std::equal(keys.begin() + r * bytes, keys.begin() + (r + 1) * bytes, first.state.key.begin() + s * bytes));
      }
      REQUIRE(found == 1);
    }
  }
}
