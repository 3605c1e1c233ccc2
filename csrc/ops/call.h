// SPDX-License-Identifier: Apache-2.0
// How C++ code and pybind11 reach an operator: through the dispatcher, so that every road meets the same checks.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace uncomp {

/// Typed handle of `uncomp::<name>`; `Signature` must match the schema exactly, which torch verifies.
template <class Signature>
c10::TypedOperatorHandle<Signature> op_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace uncomp
