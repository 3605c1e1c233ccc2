// SPDX-License-Identifier: Apache-2.0
// decode_evict_ on the device: the tensors of a problem, a step, and what it leaves.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/decode_evict/decode_evict.h"
#include "support/catch.hpp"
#include "support/device.hpp"
#include "support/evict_problem.hpp"

namespace uncomp::test {

struct EvictOutput {
  EvictState state;
  std::vector<float> out, lse;
};

/// Tensors of one problem on the device.
struct EvictOnDevice {
  DType dtype;
  DeviceArray<unsigned char> query, new_key, new_value, key, value, out;
  DeviceArray<int32_t> start, position, row_len, slot_position, votes, vote_sum, vote_step, order;
  DeviceArray<float> lse;
  kernels::DecodeEvictParams params{};
  int64_t bytes = 0;

  EvictOnDevice(const EvictProblem& p, const EvictInput& in)
      : dtype(p.dtype),
        query(encoded(in.query, p.dtype)),
        new_key(encoded(in.new_key, p.dtype)),
        new_value(encoded(in.new_value, p.dtype)),
        key(in.state.key),
        value(in.state.value),
        out(p.len.size() * p.group * p.value_dim * dtype_bytes(p.dtype)),
        start(in.start),
        position(in.new_position),
        row_len(in.state.row_len),
        slot_position(in.state.position),
        votes(in.state.votes),
        vote_sum(in.state.vote_sum),
        vote_step(in.state.vote_step),
        order(in.state.order),
        lse(p.len.size() * p.group) {
    const int32_t rows = static_cast<int32_t>(p.len.size()), rows_per_sequence = rows / p.batch;
    params.query = query.data();
    params.key = new_key.data();
    params.value = new_value.data();
    params.position = position.data();
    params.row_start = start.data();
    params.row_len = row_len.data();
    params.key_rows = key.data();
    params.value_rows = value.data();
    params.slot_position = slot_position.data();
    params.votes = votes.data();
    params.vote_sum = vote_sum.data();
    params.vote_step = vote_step.data();
    params.order = order.data();
    params.out = out.data();
    params.lse = lse.data();
    params.query_batch = int64_t{rows_per_sequence} * p.group * p.key_dim;
    params.query_head = p.key_dim;
    params.key_batch = int64_t{p.num_kv_heads} * p.key_dim;
    params.key_head = p.key_dim;
    params.value_batch = int64_t{p.num_kv_heads} * p.value_dim;
    params.value_head = p.value_dim;
    params.capacity = in.start.back();
    params.num_rows = rows;
    params.rows = rows_per_sequence;
    params.rows_per_kv = rows_per_sequence / p.num_kv_heads;
    params.group_size = p.group;
    params.key_dim = p.key_dim;
    params.value_dim = p.value_dim;
    params.vote_window = p.vote_window;
    params.window = p.window;
    params.sink = p.sink;
    params.pool = p.pool;
    params.scale = 1.0f / std::sqrt(static_cast<float>(p.key_dim));
    params.pool_mode = p.mode;
    params.reduce_group = p.reduce;
    params.dtype = p.dtype;
    cuda_ok(kernels::decode_evict_workspace_bytes(params, &bytes));
  }

  void step(void* work, cudaStream_t stream) const { cuda_ok(kernels::decode_evict(params, work, stream)); }

  EvictOutput host() const {
    for (const auto* bytes_of : {&key, &value, &out}) REQUIRE(bytes_of->guards_intact());
    for (const auto* ints : {&row_len, &slot_position, &votes, &vote_sum, &vote_step, &order}) {
      REQUIRE(ints->guards_intact());
    }
    REQUIRE(lse.guards_intact());
    return {{row_len.host(), slot_position.host(), votes.host(), vote_sum.host(), vote_step.host(), order.host(),
             key.host(), value.host()},
            decoded(out.host(), dtype),
            lse.host()};
  }
};

inline EvictOutput run(const EvictProblem& p, const EvictInput& in) {
  const EvictOnDevice on_device(p, in);
  DeviceArray<unsigned char> work(static_cast<size_t>(on_device.bytes));
  on_device.step(work.data(), nullptr);
  const EvictOutput got = on_device.host();
  REQUIRE(work.guards_intact());
  return got;
}

inline void require_same(const EvictOutput& a, const EvictOutput& b) {
  REQUIRE(std::equal(a.out.begin(), a.out.end(), b.out.begin()));
  REQUIRE(a.lse == b.lse);
  REQUIRE(a.state.row_len == b.state.row_len);
  REQUIRE(a.state.position == b.state.position);
  REQUIRE(a.state.votes == b.state.votes);
  REQUIRE(a.state.vote_sum == b.state.vote_sum);
  REQUIRE(a.state.vote_step == b.state.vote_step);
  REQUIRE(a.state.order == b.state.order);
  REQUIRE(a.state.key == b.state.key);
  REQUIRE(a.state.value == b.state.value);
}

/// Row i has 3 to `longest` tokens; every second one has room for one more.
inline EvictProblem many_rows(size_t rows, int32_t longest) {
  EvictProblem p{.len = std::vector<int32_t>(rows),
                 .room = {},
                 .batch = static_cast<int32_t>(rows / 8),
                 .num_kv_heads = 4,
                 .vote_window = 8};
  for (size_t i = 0; i < rows; ++i) {
    p.len[i] = 3 + static_cast<int32_t>(i * 37 % (longest - 2));
    p.room.push_back(p.len[i] + static_cast<int32_t>(i % 2));
  }
  return p;
}

}  // namespace uncomp::test
