// SPDX-License-Identifier: Apache-2.0
// One step of decode_evict_ on the host: sizes, the state before it, and random numbers to attend to.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "core/votes.h"
#include "support/half.hpp"

namespace uncomp::test {

struct EvictProblem {
  std::vector<int32_t> len, room;  // of each row
  int32_t batch = 1, num_kv_heads = 1, group = 4, key_dim = 64, value_dim = 64, vote_window = 3;
  int32_t window = 2, sink = 1, pool = 5;
  Pool mode = Pool::max;
  Reduce reduce = Reduce::mean;
  DType dtype = DType::bfloat16;
};

struct EvictState {
  std::vector<int32_t> row_len, position, votes, vote_sum, vote_step, order;
  std::vector<unsigned char> key, value;
};

/// The state and everything else a step reads, made on the host.
struct EvictInput {
  std::vector<int32_t> start, new_position;
  std::vector<float> query, new_key, new_value, key, value;
  EvictState state;

  explicit EvictInput(const EvictProblem& p) : start{0} {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    const int32_t rows = static_cast<int32_t>(p.len.size());
    for (const int32_t n : p.room) start.push_back(start.back() + n);
    const int64_t slots = start.back();
    const auto fill = [&](std::vector<float>& v, int64_t count) {
      v.resize(count);
      for (float& x : v) x = rounded(normal(random), p.dtype);
    };
    fill(query, int64_t{rows} * p.group * p.key_dim);
    fill(new_key, int64_t{p.batch} * p.num_kv_heads * p.key_dim);
    fill(new_value, int64_t{p.batch} * p.num_kv_heads * p.value_dim);
    fill(key, slots * p.key_dim);
    fill(value, slots * p.value_dim);
    new_position.assign(p.batch, 1 << 20);
    const int32_t garbage = std::numeric_limits<int32_t>::max();
    state.row_len = p.len;
    state.position.assign(slots, garbage);
    state.votes.assign(p.vote_window * slots, garbage);
    state.vote_sum.assign(slots, -garbage);
    state.order.assign(slots, garbage);
    for (int32_t r = 0; r < rows; ++r) {
      state.vote_step.push_back(static_cast<int32_t>(random() % p.vote_window));
      std::iota(state.order.begin() + start[r], state.order.begin() + start[r] + p.len[r], 0);
      std::shuffle(state.order.begin() + start[r], state.order.begin() + start[r] + p.len[r], random);
      const int32_t one = 1 << vote_scale_bits(p.vote_window);
      for (int64_t s = start[r]; s < start[r + 1]; ++s) {
        const bool live = s < start[r] + p.len[r];
        if (live) {
          state.position[start[r] + state.order[s]] = static_cast<int32_t>(s - start[r]);
          state.vote_sum[s] = 0;
          for (int32_t w = 0; w < p.vote_window; ++w) {
            state.votes[w * slots + s] = static_cast<int32_t>(random() % (one / p.len[r] + 1));
            state.vote_sum[s] += state.votes[w * slots + s];
          }
        } else {
          std::fill_n(key.begin() + s * p.key_dim, p.key_dim, std::nanf(""));
          std::fill_n(value.begin() + s * p.value_dim, p.value_dim, std::nanf(""));
        }
      }
    }
    state.key = encoded(key, p.dtype);
    state.value = encoded(value, p.dtype);
  }
};

}  // namespace uncomp::test
