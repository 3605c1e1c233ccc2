// SPDX-License-Identifier: Apache-2.0
// Per-device state as Python sees it.
#pragma once

#include <cstdint>
#include <string>

namespace uncomp {

/// Does what must happen on a CUDA device before the first graph capture. ValueError for a device this process
/// does not have; NotImplementedError in a build without CUDA.
void warmup_device(int64_t device_index);

/// The first violation that a kernel noted on the device since the last call, as one line, and clears it; empty
/// when there is none. Synchronises the device.
std::string take_device_error(int64_t device_index);

}  // namespace uncomp
