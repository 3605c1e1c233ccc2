// SPDX-License-Identifier: Apache-2.0
// Violations that only the device can see. A kernel notes the first one in the device's error word and leaves
// the row untouched; the host turns the code into an exception when it next looks (raise_device_errors).
#pragma once

#include <cstdint>

namespace uncomp {

enum class DeviceError : int32_t {
  none = 0,
  append_kv_no_room = 1,
  gather_tokens_index = 2,
  compact_kv_index = 3,
  compact_kv_no_room = 4,
  allocate_budget_input = 20,
  allocate_budget_total = 21,
};

/// One line for a code: operator, argument, wanted.
constexpr const char* device_error_text(DeviceError code) {
  switch (code) {
    case DeviceError::none:
      return "";
    case DeviceError::append_kv_no_room:
      return "uncomp::append_kv_: row_len + new tokens must fit into the row; a row had no room and was left as it was";
    case DeviceError::gather_tokens_index:
      return "uncomp::gather_tokens: index must lie in [-1, tokens); an entry was outside and its row was set to zero";
    case DeviceError::compact_kv_index:
      return "uncomp::compact_kv: index must lie inside the source row; an entry was outside and its slot was set to "
             "zero";
    case DeviceError::compact_kv_no_room:
      return "uncomp::compact_kv: kept tokens must fit into the row; a row had too few slots and was cut";
    case DeviceError::allocate_budget_input:
      return "uncomp::allocate_budget: group must lie in [0, G), weight in [1, 2^20], length and total in [0, 2^31); a "
             "value was outside and was clamped";
    case DeviceError::allocate_budget_total:
      return "uncomp::allocate_budget: total must be at least rows * floor; a sequence had less and its rows got the "
             "floor each";
  }
  return "unknown device error";
}

}  // namespace uncomp
