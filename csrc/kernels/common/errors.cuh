// SPDX-License-Identifier: Apache-2.0
// Notes a violation in the device's error word.
#pragma once

#include <cstdint>

#include "core/errors.h"

namespace uncomp::kernels {

/// Keeps the first violation since the host last looked.
__device__ __forceinline__ void note_error(int32_t* word, DeviceError code) {
  atomicCAS(word, 0, static_cast<int32_t>(code));
}

}  // namespace uncomp::kernels
