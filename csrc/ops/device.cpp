// SPDX-License-Identifier: Apache-2.0
// Warm-up and error word of a CUDA device.
#include "ops/device.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "core/errors.h"
#include "ops/check.h"
#if UNCOMP_WITH_CUDA
#include "kernels/runtime.h"
#include "ops/stream.h"
#endif

namespace uncomp {
namespace {

#if UNCOMP_WITH_CUDA
c10::Device checked_device(const char* op, int64_t index) {
  const bool present = c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA);
  const int64_t count = present ? c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).deviceCount() : 0;
  UNCOMP_CHECK_VALUE(op, index >= 0 && index < count, "device_index must lie in [0, ", count, "); got ", index);
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}
#else
[[noreturn]] void refuse(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "uncomp::", op, ": this build of uncomp has no CUDA kernels");
}
#endif

}  // namespace

#if UNCOMP_WITH_CUDA
void warmup_device(int64_t device_index) {
  const c10::OptionalDeviceGuard guard(checked_device("warmup", device_index));
  check_launch("warmup", kernels::warmup());
}

std::string take_device_error(int64_t device_index) {
  const c10::OptionalDeviceGuard guard(checked_device("take_device_error", device_index));
  int32_t code = 0;
  check_launch("take_device_error", kernels::take_error(&code));
  return device_error_text(static_cast<DeviceError>(code));
}
#else
void warmup_device(int64_t) { refuse("warmup"); }
std::string take_device_error(int64_t) { refuse("take_device_error"); }
#endif

}  // namespace uncomp
