// SPDX-License-Identifier: Apache-2.0
// Element types of the kernel floor, which does not know torch's.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp {

enum class DType : int32_t { float32, float16, bfloat16 };

UNCOMP_HD constexpr int32_t dtype_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

/// How the g query heads of a cache row, or the W queries of a window, become one number.
enum class Reduce : int32_t { mean, sum, max, none };

/// How scores of position neighbours are joined.
enum class Pool : int32_t { max, avg };

}  // namespace uncomp
