// SPDX-License-Identifier: Apache-2.0
// Many steps of decode_evict_: equal states stay equal whatever stream, graph or workspace they run in.
#include <algorithm>
#include <vector>

#include "support/evict_device.hpp"
#include "support/repeat.hpp"

using namespace uncomp;
using namespace uncomp::test;

// Steps of two equal states, side by side on two streams, and as a replayed graph with another workspace that holds
// NaN: rows of one cluster size each, some growing until they are full.
TEST_CASE("thousands of steps are the same on two streams and in a graph", "[decode_evict_steps][large]") {
  for (const size_t rows : {16, 56, 304}) {
    EvictProblem p = many_rows(rows, 300);
    for (size_t i = 0; i < rows; i += 3) p.room[i] = p.len[i] + static_cast<int32_t>(i % 50);
    const EvictInput in(p);
    const EvictOnDevice first(p, in), second(p, in), third(p, in);
    DeviceArray<unsigned char> work(static_cast<size_t>(first.bytes)), other(static_cast<size_t>(first.bytes)),
        poisoned(std::vector<unsigned char>(static_cast<size_t>(first.bytes), 0xff));
    const Stream one, two;
    const Graph graph(one, [&] { third.step(poisoned.data(), one); });
    const int steps = 3000;
    for (int i = 0; i < steps; ++i) {
      first.step(work.data(), one);
      second.step(other.data(), two);
    }
    cuda_ok(cudaStreamSynchronize(one));
    cuda_ok(cudaStreamSynchronize(two));
    for (int i = 0; i < steps; ++i) graph.launch();
    cuda_ok(cudaStreamSynchronize(one));
    const EvictOutput got = first.host();
    require_same(got, second.host());
    require_same(got, third.host());
    for (size_t r = 0; r < rows; ++r) {
      const int32_t begin = in.start[r], len = p.room[r];
      REQUIRE(got.state.row_len[r] == len);
      std::vector<int32_t> order(got.state.order.begin() + begin, got.state.order.begin() + begin + len);
      std::sort(order.begin(), order.end());
      for (int32_t i = 0; i < len; ++i) REQUIRE(order[i] == i);
    }
  }
}
