// SPDX-License-Identifier: Apache-2.0
// The launch itself: every byte width, piece borders, guard bands, and the error word for an index outside.
#include "kernels/gather_tokens.h"

#include "core/errors.h"
#include "kernels/runtime.h"
#include "support/catch.hpp"
#include "support/device.hpp"

using namespace uncomp;
using namespace uncomp::test;

TEST_CASE("rows of 1 byte to several pieces arrive bit-equal and nothing else is written", "[gather_tokens]") {
  const int32_t batch = 2, seq_len = 7;
  const std::vector<int32_t> index{6, -1, 0, 3, 3, 1};
  for (const int32_t bytes : {1, 2, 12, 40, 4096, 4098, 9000, 65536}) {
    const std::vector<char> source = numbered_bytes(static_cast<size_t>(batch) * seq_len * bytes);
    DeviceArray<char> from(source), to(index.size() * bytes);
    DeviceArray<int32_t> tokens(index);
    kernels::GatherTokensParams params{};
    params.index = tokens.data();
    params.num_tensors = 1;
    params.batch = batch;
    params.num_wanted = 3;
    params.seq_len = seq_len;
    params.source[0] = {from.data(), to.data(), int64_t{seq_len} * bytes, bytes, bytes, bytes & -bytes, 0};
    if (params.source[0].lane_bytes > 16) params.source[0].lane_bytes = 16;
    cuda_ok(kernels::gather_tokens(params, nullptr));
    const std::vector<char> got = to.host();
    for (size_t i = 0; i < index.size(); ++i) {
      for (int32_t b = 0; b < bytes; ++b) {
        const char want = index[i] < 0 ? 0 : source[(i / 3 * seq_len + index[i]) * bytes + b];
        if (got[i * bytes + b] != want) FAIL("bytes " << bytes << " entry " << i << " byte " << b);
      }
    }
    REQUIRE(to.guards_intact());
  }
}

TEST_CASE("an index outside gives zeros and is noted once", "[gather_tokens]") {
  DeviceArray<char> from(numbered_bytes(4 * 16)), to(2 * 16);
  DeviceArray<int32_t> tokens(std::vector<int32_t>{4, -2});
  kernels::GatherTokensParams params{};
  params.index = tokens.data();
  params.num_tensors = 1;
  params.batch = 1;
  params.num_wanted = 2;
  params.seq_len = 4;
  params.source[0] = {from.data(), to.data(), 64, 16, 16, 16, 0};
  cuda_ok(kernels::gather_tokens(params, nullptr));
  int32_t code = 0;
  cuda_ok(kernels::take_error(&code));
  REQUIRE(code == static_cast<int32_t>(DeviceError::gather_tokens_index));
  cuda_ok(kernels::take_error(&code));
  REQUIRE(code == 0);
  REQUIRE(to.host() == std::vector<char>(32, 0));
}
