// SPDX-License-Identifier: Apache-2.0
// The launch itself: every byte width, piece borders, guard bands, and the error word for an index outside.
#include "kernels/gather_tokens.h"

#include <algorithm>
#include <random>

#include "core/errors.h"
#include "kernels/runtime.h"
#include "support/catch.hpp"
#include "support/device.hpp"
#include "support/repeat.hpp"

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

namespace {

/// Two tensors of 300 tokens in two sequences by one index, which may change.
struct Gather {
  static constexpr int32_t kBatch = 2, kSeqLen = 300;
  const int32_t wanted, first_bytes, second_bytes;
  const std::vector<char> first, second;
  DeviceArray<char> from_first, from_second, to_first, to_second;
  DeviceArray<int32_t> index;
  kernels::GatherTokensParams params{};

  Gather(int32_t wanted_, int32_t first_bytes_, int32_t second_bytes_)
      : wanted(wanted_),
        first_bytes(first_bytes_),
        second_bytes(second_bytes_),
        first(numbered_bytes(size_t{kBatch} * kSeqLen * first_bytes, 1)),
        second(numbered_bytes(size_t{kBatch} * kSeqLen * second_bytes, 2)),
        from_first(first),
        from_second(second),
        to_first(size_t{kBatch} * wanted * first_bytes),
        to_second(size_t{kBatch} * wanted * second_bytes),
        index(random_index(0)) {
    params.index = index.data();
    params.num_tensors = 2;
    params.batch = kBatch;
    params.num_wanted = wanted;
    params.seq_len = kSeqLen;
    const auto source = [](DeviceArray<char>& from, DeviceArray<char>& to, int32_t bytes) {
      return kernels::GatherTokensParams::Source{
          from.data(), to.data(), int64_t{kSeqLen} * bytes, bytes, bytes, std::min(bytes & -bytes, 16), 0};
    };
    params.source[0] = source(from_first, to_first, first_bytes);
    params.source[1] = source(from_second, to_second, second_bytes);
  }

  /// Every third entry wants zeros.
  std::vector<int32_t> random_index(uint32_t seed) const {
    std::mt19937 random(seed);
    std::vector<int32_t> tokens(size_t{kBatch} * wanted);
    for (int32_t& t : tokens) t = random() % 3 == 0 ? -1 : static_cast<int32_t>(random() % kSeqLen);
    return tokens;
  }
  void launch(cudaStream_t stream) { cuda_ok(kernels::gather_tokens(params, stream)); }
  void poison() {
    to_first.fill(0x5a);
    to_second.fill(0x5a);
  }
  Bytes results() const { return contents(to_first, to_second); }

  /// The results of the last launch against the sources.
  void check() const {
    const std::vector<int32_t> tokens = index.host();
    const auto check_one = [&](const std::vector<char>& got, const std::vector<char>& source, int32_t bytes) {
      for (size_t i = 0; i < tokens.size(); ++i) {
        const size_t token = i / wanted * kSeqLen + std::max(tokens[i], 0);
        for (int32_t b = 0; b < bytes; ++b) {
          if (got[i * bytes + b] != (tokens[i] < 0 ? 0 : source[token * bytes + b]))
            FAIL("bytes " << bytes << " entry " << i << " byte " << b);
        }
      }
    };
    check_one(to_first.host(), first, first_bytes);
    check_one(to_second.host(), second, second_bytes);
    REQUIRE((to_first.guards_intact() && to_second.guards_intact()));
  }
};

}  // namespace

TEST_CASE("gathers in a row and on three streams at once repeat every byte", "[gather_tokens][large]") {
  Gather one_piece(200, 256, 4), pieces(9, 9000, 4098), odd(1000, 3, 40);
  for (Gather* call : {&one_piece, &pieces, &odd}) require_repeats(*call, 10000, 100);
  require_apart(100, 100, one_piece, pieces, odd);
  for (const Gather* call : {&one_piece, &pieces, &odd}) call->check();
}

TEST_CASE("one captured graph follows an index that changes", "[gather_tokens][large]") {
  Gather call(150, 4100, 24);
  const auto change = [&](int step) { call.index.assign(call.random_index(static_cast<uint32_t>(step))); };
  require_graph_follows(call, 50, change, [&](int) { call.check(); });
}
