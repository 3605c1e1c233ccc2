// SPDX-License-Identifier: Apache-2.0
// Ragged rows must give what torch's attention gives on each row alone, on every device.
#include "ops/decode_attention.h"

#include <cmath>
#include <limits>

#include "support/precompiled.hpp"
#include "support/torch.hpp"

namespace {

struct Example {
  at::Tensor query, key_rows, value_rows, row_start, row_len;
};

/// Two sequences of two rows, three heads a row; dead slots are NaN and one row is empty.
Example example(at::Device device) {
  const at::TensorOptions options = at::device(device).dtype(at::kFloat);
  Example e{at::randn({2, 6, 1, 24}, options), at::randn({80, 24}, options), at::randn({80, 40}, options),
            at::tensor({0, 4, 4, 74, 80}, at::kInt).to(device), at::tensor({2, 0, 69, 6}, at::kInt).to(device)};
  for (const int64_t dead : {2, 3, 73}) {
    e.key_rows[dead].fill_(std::nan(""));
    e.value_rows[dead].fill_(std::nan(""));
  }
  return e;
}

}  // namespace

TEST_CASE("each group of heads attends over its own live slots", "[decode_attention]") {
  for (const at::Device device : uncomp::test::devices()) {
    const Example e = example(device);
    const auto [out, lse] = uncomp::decode_attention(e.query, e.key_rows, e.value_rows, e.row_start, e.row_len, 0.25);
    REQUIRE(out.sizes() == at::IntArrayRef({2, 6, 1, 40}));
    REQUIRE(lse.sizes() == at::IntArrayRef({2, 6}));
    for (int64_t row = 0; row < 4; ++row) {
      const int64_t start = e.row_start[row].item<int>(), len = e.row_len[row].item<int>();
      const at::Tensor o = out[row / 2].narrow(0, row % 2 * 3, 3).squeeze(1).cpu();
      const at::Tensor l = lse[row / 2].narrow(0, row % 2 * 3, 3).cpu();
      if (len == 0) {
        REQUIRE(at::equal(o, at::zeros_like(o)));
        REQUIRE(l.isneginf().all().item<bool>());
        continue;
      }
      const at::Tensor q = e.query[row / 2].narrow(0, row % 2 * 3, 3).squeeze(1).cpu().to(at::kDouble);
      const at::Tensor logits = q.mm(e.key_rows.narrow(0, start, len).cpu().to(at::kDouble).t()) * 0.25;
      const at::Tensor want = logits.softmax(1).mm(e.value_rows.narrow(0, start, len).cpu().to(at::kDouble));
      REQUIRE(at::allclose(o.to(at::kDouble), want, 1e-5, 1e-5));
      REQUIRE(at::allclose(l.to(at::kDouble), logits.logsumexp(1), 1e-5, 1e-5));
    }
  }
}

TEST_CASE("a wrong dtype and a row beyond its room are refused by name", "[decode_attention]") {
  const Example e = example(at::kCPU);
  REQUIRE_THROWS_WITH(
      uncomp::decode_attention(e.query, e.key_rows.to(at::kHalf), e.value_rows, e.row_start, e.row_len, 0.25),
      uncomp::test::ContainsSubstring("uncomp::decode_attention: key_rows must have the dtype of query"));
  REQUIRE_THROWS_WITH(
      uncomp::decode_attention(e.query, e.key_rows, e.value_rows, e.row_start, e.row_len + 3, 0.25),
      uncomp::test::ContainsSubstring("uncomp::decode_attention: row_len must lie in [0, room]; got 5 for row 0"));
}
