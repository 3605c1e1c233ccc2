// SPDX-License-Identifier: Apache-2.0
// Names of all operators, in the order of the method.
#pragma once

namespace uncomp {

inline constexpr const char* kOpNames[] = {
    "matrix_spectrum", "matrix_entropy",   "group_heads",   "allocate_budget", "window_scores",
    "seed_votes_",     "select_tokens",    "compact_kv",    "append_kv_",      "decode_attention",
    "decode_evict_",   "ragged_attention", "gather_tokens",
};

}  // namespace uncomp
