// SPDX-License-Identifier: Apache-2.0
// Packed rows and the plain loop in double that the tests of attention over an arena hold their launches against.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/half.hpp"

namespace uncomp::test {

/// Normal numbers that `dtype` can hold.
inline std::vector<float> random_numbers(size_t count, DType dtype, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& x : numbers) x = rounded(normal(random), dtype);
  return numbers;
}

/// An arena of rows with `spare` dead slots behind each; dead slots are NaN.
struct PackedRows {
  std::vector<int32_t> start{0};  // [R + 1]
  std::vector<float> key, value;  // [C, Dk], [C, Dv]
  int64_t slots;                  // C

  PackedRows(const std::vector<int32_t>& len, int32_t spare, int32_t key_dim, int32_t value_dim, DType dtype) {
    for (const int32_t n : len) start.push_back(start.back() + n + spare);
    slots = start.back();
    key = random_numbers(static_cast<size_t>(slots * key_dim), dtype, 2);
    value = random_numbers(static_cast<size_t>(slots * value_dim), dtype, 3);
    for (size_t r = 0; r < len.size(); ++r) {
      const int64_t begin = start[r] + len[r], end = start[r + 1];
      std::fill(key.begin() + begin * key_dim, key.begin() + end * key_dim, std::nanf(""));
      std::fill(value.begin() + begin * value_dim, value.begin() + end * value_dim, std::nanf(""));
    }
  }
};

/// Attention of queries, one after the other, and how far a result is from it. For each query: `begin`, then `see` or
/// `add` all that it attends to, then `compare`; at the end `check_all`.
class AttentionOracle {
 public:
  AttentionOracle(int32_t key_dim, int32_t value_dim, double scale, DType dtype)
      : key_dim_(key_dim), value_dim_(value_dim), scale_(scale), dtype_(dtype) {}

  void begin(const float* query) {
    query_ = query;
    logits_.clear();
    values_.clear();
  }

  void see(const float* key, const float* value) {
    // Eight sums at a time: one alone would wait for itself.
    double dots[8] = {};
    int32_t d = 0;
    for (; d + 8 <= key_dim_; d += 8) {
      for (int32_t i = 0; i < 8; ++i) dots[i] += double{query_[d + i]} * key[d + i];
    }
    for (; d < key_dim_; ++d) dots[0] += double{query_[d]} * key[d];
    add(std::accumulate(dots, dots + 8, 0.0) * scale_, value);
  }

  void add(double logit, const float* value) {
    logits_.push_back(logit);
    values_.push_back(value);
  }

  /// All live slots of a row.
  void see_row(const PackedRows& rows, int32_t row, int32_t len) {
    for (int64_t s = rows.start[row]; s < rows.start[row] + len; ++s) {
      see(&rows.key[s * key_dim_], &rows.value[s * value_dim_]);
    }
  }

  void compare(const float* out, float lse, size_t query) {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const double x : logits_) top = std::max(top, x);
    std::vector<double> want(value_dim_);
    for (size_t i = 0; i < logits_.size(); ++i) {
      const double weight = std::exp(logits_[i] - top);
      sum += weight;
      for (int32_t d = 0; d < value_dim_; ++d) want[d] += weight * values_[i][d];
    }
    if (logits_.empty()) {
      if (lse != -std::numeric_limits<float>::infinity()) FAIL("lse of query " << query << " that sees nothing");
    } else if (!(std::abs(lse - (top + std::log(sum))) < 1e-4)) {
      FAIL("lse of query " << query << ": " << lse << " for " << top + std::log(sum));
    }
    double off = 0, norm = 0;
    for (int32_t d = 0; d < value_dim_; ++d) {
      const double x = out[d], y = logits_.empty() ? 0 : want[d] / sum;
      off += (x - y) * (x - y);
      norm += y * y;
    }
    if (!(off <= 4e-4 * norm)) FAIL("query " << query << " off by " << std::sqrt(off / norm));
    off_ += off;
    norm_ += norm;
  }

  /// The error of all queries together, which rounding of single ones does not blur.
  void check_all() const {
    const double bound = dtype_ == DType::float32 ? 1e-5 : dtype_ == DType::float16 ? 2e-3 : 1e-2;
    REQUIRE(std::sqrt(off_) <= bound * std::sqrt(norm_));
  }

 private:
  int32_t key_dim_, value_dim_;
  double scale_;
  DType dtype_;
  const float* query_ = nullptr;
  std::vector<double> logits_;
  std::vector<const float*> values_;
  double off_ = 0, norm_ = 0;
};

}  // namespace uncomp::test
