// SPDX-License-Identifier: Apache-2.0
// decode_evict_: CPU body. Rows are independent; each runs the five steps of the contract in order.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/eviction.h"
#include "core/ragged.h"
#include "core/votes.h"
#include "ops/arena.h"
#include "ops/decode_evict.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "decode_evict_";
constexpr float kInf = std::numeric_limits<float>::infinity();

struct State {
  RaggedRows rows;
  int32_t *row_len, *slot_position, *votes, *vote_sum, *vote_step, *order;
};

/// What only the data can violate beyond the layout of rows, looked at before anything is written.
void check_data(const DecodeEvictSizes& sizes, const State& state) {
  std::vector<char> seen;
  for (int32_t r = 0; r < sizes.num_rows; ++r) {
    const int64_t start = state.rows.start(r), room = state.rows.room(r), len = state.rows.len(r);
    const int64_t least = int64_t{sizes.window} + sizes.sink;
    UNCOMP_CHECK_VALUE(kOp, room == 0 || room >= least,
                       "the room of a row must be 0 or at least window + sink = ", least, "; got ", room, " at row ",
                       r);
    seen.assign(len, 0);
    for (int64_t i = 0; i < len; ++i) {
      const int32_t slot = state.order[start + i];
      const bool fresh = slot >= 0 && slot < len && !seen[slot];
      UNCOMP_CHECK_VALUE(kOp, fresh, "order must hold every slot 0 .. ", len - 1, " of row ", r, " once; got ", slot,
                         " at place ", i);
      seen[slot] = 1;
    }
  }
}

/// Eight partial sums, so that the compiler can use vectors; dims are multiples of 8.
float dot(const float* a, const float* b, int32_t dim) {
  float part[8] = {};
  for (int32_t d = 0; d < dim; d += 8) {
    for (int i = 0; i < 8; ++i) part[i] += a[d + i] * b[d + i];
  }
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

template <class T>
const float* as_float(const T* from, int32_t dim, std::vector<float>& scratch) {
  if constexpr (std::is_same_v<T, float>) return from;
  for (int32_t d = 0; d < dim; ++d) scratch[d] = static_cast<float>(from[d]);
  return scratch.data();
}

template <class T>
struct Row {
  int32_t len, group_size, key_dim, value_dim;
  const T *key_rows, *value_rows;  // of this row's first slot
  const T *key, *value;            // the new token
  const T* key_of(int32_t token) const { return token < len ? key_rows + int64_t{token} * key_dim : key; }
  const T* value_of(int32_t token) const { return token < len ? value_rows + int64_t{token} * value_dim : value; }
};

/// Step 1: out [g, Dv] and lse [g] over K + 1 tokens. `weight` [K + 1, g] comes back as softmax weights.
template <class T>
void attend(const Row<T>& row, const std::vector<float>& query, float scale, std::vector<float>& weight, T* out,
            float* lse) {
  const int32_t group = row.group_size, tokens = row.len + 1;
  std::vector<float> scratch(std::max(row.key_dim, row.value_dim)), largest(group, -kInf), total(group, 0.0f);
  for (int32_t j = 0; j < tokens; ++j) {
    const float* key = as_float(row.key_of(j), row.key_dim, scratch);
    for (int32_t h = 0; h < group; ++h) {
      const float logit = scale * dot(query.data() + int64_t{h} * row.key_dim, key, row.key_dim);
      weight[int64_t{j} * group + h] = logit;
      if (logit > largest[h]) largest[h] = logit;  // NaN never is, and reaches the sum below
    }
  }
  for (int32_t h = 0; h < group; ++h) {
    const float base = largest[h] == -kInf ? 0.0f : largest[h];
    for (int32_t j = 0; j < tokens; ++j) {
      float& w = weight[int64_t{j} * group + h];
      w = std::exp(w - base);
      total[h] += w;
    }
    lse[h] = total[h] == 0.0f ? -kInf : base + std::log(total[h]);
    // With no finite logit at all this makes 0 / 0 = NaN: a vote of 0. The output is set to 0 below.
    for (int32_t j = 0; j < tokens; ++j) weight[int64_t{j} * group + h] /= total[h];
  }
  std::vector<float> sum(static_cast<size_t>(group) * row.value_dim, 0.0f);
  for (int32_t j = 0; j < tokens; ++j) {
    const float* value = as_float(row.value_of(j), row.value_dim, scratch);
    for (int32_t h = 0; h < group; ++h) {
      const float w = weight[int64_t{j} * group + h];
      float* to = sum.data() + int64_t{h} * row.value_dim;
      for (int32_t d = 0; d < row.value_dim; ++d) to[d] += w * value[d];
    }
  }
  for (int32_t h = 0; h < group; ++h) {
    for (int32_t d = 0; d < row.value_dim; ++d) {
      const int64_t at = int64_t{h} * row.value_dim + d;
      out[at] = static_cast<T>(total[h] == 0.0f ? 0.0f : sum[at]);
    }
  }
}

/// Step 2: one weight from the g heads of a token. "sum" is stored as the mean.
float reduce_heads(const float* weight, int32_t group, Reduce reduce) {
  float all = weight[0];
  for (int32_t h = 1; h < group; ++h) {
    if (reduce != Reduce::max) {
      all += weight[h];
    } else if (weight[h] > all || std::isnan(weight[h])) {
      all = weight[h];
    }
  }
  return reduce == Reduce::max ? all : all / static_cast<float>(group);
}

/// Step 4: place in position order of the token that leaves.
int32_t choose_leaver(const EvictStep& step, const int32_t* order, const int32_t* vote_sum, int32_t pool, Pool mode) {
  Leaver best = kNobody;
  for (int32_t place = step.first; place < step.candidates; ++place) {
    const int32_t begin = step.pool_begin(place, pool / 2), end = step.pool_end(place, pool / 2);
    int64_t score = mode == Pool::max ? std::numeric_limits<int32_t>::min() : 0;
    for (int32_t i = begin; i < end; ++i) {
      const int64_t sum = vote_sum[order[i]];
      score = mode == Pool::max ? std::max(score, sum) : score + sum;
    }
    const Leaver leaver{score, place};
    if (leaves_before(leaver, best)) best = leaver;
  }
  return best.place;
}

/// Steps 2 to 5 on the integers of a row; returns the slot of the new token.
int32_t vote_and_choose(const DecodeEvictSizes& sizes, const State& state, int32_t r, const EvictStep& step,
                        const std::vector<float>& weight) {
  const int64_t start = state.rows.start(r);
  const int32_t bits = vote_scale_bits(sizes.vote_window), len = step.len;
  const int32_t ring_row = vote_ring_row(state.vote_step[r], sizes.vote_window);
  const auto vote_of = [&](int32_t token) {
    const float* heads = weight.data() + int64_t{token} * sizes.group_size;
    return quantize_vote(reduce_heads(heads, sizes.group_size, sizes.reduce_group), bits);
  };
  int32_t* ring = state.votes + ring_row * sizes.capacity + start;
  int32_t* sum = state.vote_sum + start;
  int32_t* order = state.order + start;
  for (int32_t j = 0; j < len; ++j) {
    const int32_t vote = vote_of(j);
    // Unsigned, so that a state that is no sum of votes wraps instead of being undefined.
    sum[j] = static_cast<int32_t>(static_cast<uint32_t>(sum[j]) +
                                  (static_cast<uint32_t>(vote) - static_cast<uint32_t>(ring[j])));
    ring[j] = vote;
  }
  int32_t slot = len;
  if (step.kind == EvictStep::Kind::append) {
    order[len] = slot;
    state.row_len[r] = len + 1;
  } else {
    const int32_t place = choose_leaver(step, order, sum, sizes.pool, sizes.pool_mode);
    slot = order[place];
    for (int32_t i = place; i < len - 1; ++i) order[i] = order[order_source(i, place)];
    order[len - 1] = slot;
  }
  const int32_t own = vote_of(len);
  for (int32_t w = 0; w < sizes.vote_window; ++w) {
    state.votes[w * sizes.capacity + start + slot] = w == ring_row ? own : 0;
  }
  sum[slot] = own;
  state.vote_step[r] = vote_ring_row(ring_row + 1, sizes.vote_window);
  return slot;
}

template <class T>
void step_rows(const DecodeEvictCall& call, const DecodeEvictSizes& sizes, const State& state, T* out, float* lse) {
  const int32_t group = sizes.group_size;
  const T* query = call.query.const_data_ptr<T>();
  T* key_rows = call.key_rows.mutable_data_ptr<T>();
  T* value_rows = call.value_rows.mutable_data_ptr<T>();
  const int32_t* position = call.position.const_data_ptr<int32_t>();
  at::parallel_for(0, sizes.num_rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> weight, row_query(static_cast<size_t>(group) * sizes.key_dim);
    for (int32_t r = static_cast<int32_t>(begin); r < end; ++r) {
      const int64_t b = r / sizes.rows, in_sequence = r % sizes.rows, first_head = int64_t{r} * group;
      T* row_out = out + first_head * sizes.value_dim;
      float* row_lse = lse + first_head;
      const EvictStep step = evict_step(state.row_len[r], state.rows.room(r), sizes.window, sizes.sink);
      if (step.kind == EvictStep::Kind::nothing) {
        std::fill_n(row_out, int64_t{group} * sizes.value_dim, T(0.0f));
        std::fill_n(row_lse, group, -kInf);
        continue;
      }
      const int64_t start = state.rows.start(r), kv_head = in_sequence / (sizes.rows / sizes.num_kv_heads);
      const Row<T> row{step.len,
                       group,
                       sizes.key_dim,
                       sizes.value_dim,
                       key_rows + start * sizes.key_dim,
                       value_rows + start * sizes.value_dim,
                       call.key.const_data_ptr<T>() + b * call.key.stride(0) + kv_head * call.key.stride(1),
                       call.value.const_data_ptr<T>() + b * call.value.stride(0) + kv_head * call.value.stride(1)};
      for (int32_t h = 0; h < group; ++h) {
        const T* from = query + b * call.query.stride(0) + (in_sequence * group + h) * call.query.stride(1);
        for (int32_t d = 0; d < sizes.key_dim; ++d) {
          row_query[int64_t{h} * sizes.key_dim + d] = static_cast<float>(from[d]);
        }
      }
      weight.resize((static_cast<size_t>(step.len) + 1) * group);
      attend(row, row_query, static_cast<float>(call.scale), weight, row_out, row_lse);
      const int64_t slot = start + vote_and_choose(sizes, state, r, step, weight);
      std::memcpy(key_rows + slot * sizes.key_dim, row.key, sizes.key_dim * sizeof(T));
      std::memcpy(value_rows + slot * sizes.value_dim, row.value, sizes.value_dim * sizeof(T));
      state.slot_position[slot] = position[b];
    }
  });
}

std::tuple<at::Tensor, at::Tensor> decode_evict_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
    const at::Tensor& row_start, const at::Tensor& row_len, const at::Tensor& key_rows, const at::Tensor& value_rows,
    const at::Tensor& slot_position, const at::Tensor& votes, const at::Tensor& vote_sum, const at::Tensor& vote_step,
    const at::Tensor& order, int64_t window, int64_t sink, int64_t pool, double scale, std::string_view pool_mode,
    std::string_view reduce_group) {
  const DecodeEvictCall call{query,      key,           value, position,  row_start,   row_len, key_rows,
                             value_rows, slot_position, votes, vote_sum,  vote_step,   order,   window,
                             sink,       pool,          scale, pool_mode, reduce_group};
  const DecodeEvictSizes sizes = check_decode_evict(call);
  const RaggedRows rows = checked_rows(kOp, row_start, row_len, sizes.capacity);
  const State state{rows,
                    row_len.mutable_data_ptr<int32_t>(),
                    slot_position.mutable_data_ptr<int32_t>(),
                    votes.mutable_data_ptr<int32_t>(),
                    vote_sum.mutable_data_ptr<int32_t>(),
                    vote_step.mutable_data_ptr<int32_t>(),
                    order.mutable_data_ptr<int32_t>()};
  check_data(sizes, state);
  at::Tensor out = at::empty({query.size(0), query.size(1), 1, sizes.value_dim}, query.options());
  at::Tensor lse = at::empty({query.size(0), query.size(1)}, query.options().dtype(at::kFloat));
  AT_DISPATCH_SWITCH(
      query.scalar_type(), kOp, AT_DISPATCH_CASE(at::kFloat, [&] {
        step_rows<scalar_t>(call, sizes, state, out.mutable_data_ptr<scalar_t>(), lse.mutable_data_ptr<float>());
      }) AT_DISPATCH_CASE(at::kHalf, [&] {
        step_rows<scalar_t>(call, sizes, state, out.mutable_data_ptr<scalar_t>(), lse.mutable_data_ptr<float>());
      }) AT_DISPATCH_CASE(at::kBFloat16, [&] {
        step_rows<scalar_t>(call, sizes, state, out.mutable_data_ptr<scalar_t>(), lse.mutable_data_ptr<float>());
      }));
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("decode_evict_", &decode_evict_cpu); }

}  // namespace
}  // namespace uncomp
