// SPDX-License-Identifier: Apache-2.0
// A call of ragged_attention on the device, and the plain loop for it.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/ragged_attention/ragged_attention.h"
#include "support/attention.hpp"
#include "support/device.hpp"
#include "support/repeat.hpp"

namespace uncomp::test::ragged {

enum class New { none, keys, other };

struct Problem {
  std::vector<int32_t> len;
  int32_t batch = 1, group = 4, tokens = 5, key_dim = 64, value_dim = 64;
  New fresh = New::none;
  std::vector<int32_t> first = {}, length = {};
  DType dtype = DType::float16;
  float scale_factor = 1.0f;
};

/// The tensors of a problem on the device, and launches over them.
class Call {
 public:
  explicit Call(const Problem& p)
      : p_(p),
        rows_(static_cast<int32_t>(p.len.size())),
        per_sequence_(rows_ / p.batch),
        queries_(static_cast<size_t>(rows_) * p.group * p.tokens),
        packed_(p.len, 2, p.key_dim, p.value_dim, p.dtype),
        query_(random_numbers(queries_ * p.key_dim, p.dtype, 1)),
        new_key_(random_numbers(queries_ / p.group * p.key_dim, p.dtype, 4)),
        new_value_(random_numbers(queries_ / p.group * p.value_dim, p.dtype, 5)),
        other_(random_numbers(queries_ * p.value_dim, p.dtype, 6)),
        other_lse_(other_lse(queries_)),
        q_(encoded(query_, p.dtype)),
        k_(encoded(packed_.key, p.dtype)),
        v_(encoded(packed_.value, p.dtype)),
        nk_(encoded(new_key_, p.dtype)),
        nv_(encoded(new_value_, p.dtype)),
        oo_(encoded(other_, p.dtype)),
        ol_(other_lse_),
        lse_(queries_),
        out_(queries_ * p.value_dim * dtype_bytes(p.dtype)),
        starts_(packed_.start),
        lens_(p.len),
        firsts_(p.first),
        lengths_(p.length) {
    const auto strides = [&](int32_t heads, int32_t dim) {
      return Strides3{int64_t{heads} * p.tokens * dim, int64_t{p.tokens} * dim, dim};
    };
    params_.query = q_.data();
    params_.query_strides = strides(per_sequence_ * p.group, p.key_dim);
    params_.rows_per_kv_head = 1;
    if (p.fresh == New::keys) {
      params_.key = nk_.data();
      params_.value = nv_.data();
      params_.key_strides = strides(per_sequence_, p.key_dim);
      params_.value_strides = strides(per_sequence_, p.value_dim);
    }
    if (p.fresh == New::other) {
      params_.other_out = oo_.data();
      params_.other_lse = ol_.data();
      params_.other_out_strides = strides(per_sequence_ * p.group, p.value_dim);
      params_.other_lse_strides = strides(per_sequence_ * p.group, 1);
    }
    params_.tokens = {p.first.empty() ? nullptr : firsts_.data(), p.length.empty() ? nullptr : lengths_.data(),
                      p.tokens};
    params_.key_rows = k_.data();
    params_.value_rows = v_.data();
    params_.rows = {starts_.data(), lens_.data(), packed_.slots, rows_};
    params_.out = out_.data();
    params_.lse = lse_.data();
    params_.rows_per_sequence = per_sequence_;
    params_.group_size = p.group;
    params_.key_dim = p.key_dim;
    params_.value_dim = p.value_dim;
    params_.scale = scale();
    params_.dtype = p.dtype;
    int64_t bytes = 0;
    cuda_ok(kernels::ragged_attention_workspace_bytes(params_, &bytes));
    work_ = std::make_unique<DeviceArray<unsigned char>>(static_cast<size_t>(bytes));
  }

  void launch(cudaStream_t stream = nullptr) { cuda_ok(kernels::ragged_attention(params_, work_->data(), stream)); }

  Bytes results() const { return contents(out_, lse_); }

  /// New lengths of the rows, none beyond the first ones, for the launches to come.
  void shorten(const std::vector<int32_t>& len) {
    p_.len = len;
    lens_.assign(len);
  }

  /// Everything that a launch writes becomes NaN.
  void poison() {
    out_.fill(0xff);
    lse_.fill(0xff);
    work_->fill(0xff);
  }

  bool guards_intact() const { return out_.guards_intact() && lse_.guards_intact() && work_->guards_intact(); }

  /// The results of the last launch against the plain loop.
  void check() const {
    const std::vector<float> got = decoded(out_.host(), p_.dtype), got_lse = lse_.host();
    AttentionOracle oracle(p_.key_dim, p_.value_dim, scale(), p_.dtype);
    for (size_t i = 0; i < queries_; ++i) {
      const int32_t t = static_cast<int32_t>(i % p_.tokens), r = static_cast<int32_t>(i / p_.tokens / p_.group),
                    b = r / per_sequence_;
      const int32_t first = p_.first.empty() ? 0 : p_.first[b];
      const int32_t count = p_.length.empty() ? p_.tokens - first : p_.length[b];
      oracle.begin(&query_[i * p_.key_dim]);
      if (t >= first && t < first + count) {
        oracle.see_row(packed_, r, p_.len[r]);
        if (p_.fresh == New::keys) {
          for (int32_t j = first; j <= t; ++j) {
            const size_t at = static_cast<size_t>(r) * p_.tokens + j;
            oracle.see(&new_key_[at * p_.key_dim], &new_value_[at * p_.value_dim]);
          }
        }
        if (p_.fresh == New::other && !std::isinf(other_lse_[i])) oracle.add(other_lse_[i], &other_[i * p_.value_dim]);
      }
      oracle.compare(&got[i * p_.value_dim], got_lse[i], i);
    }
    oracle.check_all();
  }

 private:
  float scale() const { return p_.scale_factor / std::sqrt(static_cast<float>(p_.key_dim)); }
  static std::vector<float> other_lse(size_t queries) {
    std::vector<float> lse = random_numbers(queries, DType::float32, 7);
    for (size_t i = 0; i < queries; i += 3) lse[i] = -std::numeric_limits<float>::infinity();
    return lse;
  }

  Problem p_;
  int32_t rows_, per_sequence_;
  size_t queries_;
  PackedRows packed_;
  std::vector<float> query_, new_key_, new_value_, other_, other_lse_;
  DeviceArray<unsigned char> q_, k_, v_, nk_, nv_, oo_;
  DeviceArray<float> ol_, lse_;
  DeviceArray<unsigned char> out_;
  DeviceArray<int32_t> starts_, lens_, firsts_, lengths_;
  std::unique_ptr<DeviceArray<unsigned char>> work_;
  kernels::RaggedAttentionParams params_{};
};

}  // namespace uncomp::test::ragged
