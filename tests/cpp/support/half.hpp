// SPDX-License-Identifier: Apache-2.0
// Half-precision numbers as bytes, for tests of the kernel floor that are compiled without nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <vector>

#include "core/dtype.h"

namespace uncomp::test {

/// Numbers as an array of `dtype` in memory.
inline std::vector<unsigned char> encoded(const std::vector<float>& numbers, DType dtype) {
  const size_t width = static_cast<size_t>(dtype_bytes(dtype));
  std::vector<unsigned char> bytes(numbers.size() * width);
  for (size_t i = 0; i < numbers.size(); ++i) {
    const __half half = __float2half(numbers[i]);
    const __nv_bfloat16 bfloat = __float2bfloat16(numbers[i]);
    const void* from = dtype == DType::float32   ? static_cast<const void*>(&numbers[i])
                       : dtype == DType::float16 ? static_cast<const void*>(&half)
                                                 : static_cast<const void*>(&bfloat);
    std::memcpy(&bytes[i * width], from, width);
  }
  return bytes;
}

inline std::vector<float> decoded(const std::vector<unsigned char>& bytes, DType dtype) {
  const size_t width = static_cast<size_t>(dtype_bytes(dtype));
  std::vector<float> numbers(bytes.size() / width);
  for (size_t i = 0; i < numbers.size(); ++i) {
    __half half;
    __nv_bfloat16 bfloat;
    void* to = dtype == DType::float32   ? static_cast<void*>(&numbers[i])
               : dtype == DType::float16 ? static_cast<void*>(&half)
                                         : static_cast<void*>(&bfloat);
    std::memcpy(to, &bytes[i * width], width);
    if (dtype == DType::float16) numbers[i] = __half2float(half);
    if (dtype == DType::bfloat16) numbers[i] = __bfloat162float(bfloat);
  }
  return numbers;
}

/// The number that `dtype` can hold.
inline float rounded(float x, DType dtype) {
  if (dtype == DType::float16) return __half2float(__float2half(x));
  return dtype == DType::bfloat16 ? __bfloat162float(__float2bfloat16(x)) : x;
}

}  // namespace uncomp::test
