// SPDX-License-Identifier: Apache-2.0
// Element types on the device: conversion to and from fp32, 16-byte vectors, DType to type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtype.h"

namespace uncomp::kernels {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Element `index` of an array of `dtype`.
__device__ __forceinline__ float load_float(const void* array, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(array)[index];
    case DType::float16:
      return to_float(static_cast<const __half*>(array)[index]);
    case DType::bfloat16:
      return to_float(static_cast<const __nv_bfloat16*>(array)[index]);
  }
  return 0.0f;
}

/// Stores `x` as element `index` of an array of `dtype`: for kernels too small to be worth a copy for each type.
__device__ __forceinline__ void store_float(void* array, DType dtype, int64_t index, float x) {
  switch (dtype) {
    case DType::float32:
      static_cast<float*>(array)[index] = x;
      break;
    case DType::float16:
      static_cast<__half*>(array)[index] = from_float<__half>(x);
      break;
    case DType::bfloat16:
      static_cast<__nv_bfloat16*>(array)[index] = from_float<__nv_bfloat16>(x);
      break;
  }
}

/// Two fp32 values as one packed half-precision register; the first value in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  const __half2 packed = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(packed);
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(packed);
}

/// 16 bytes of T, loaded and stored in one instruction.
template <class T>
struct alignas(16) Vec16 {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T data[kCount];
};

template <class T>
__device__ __forceinline__ Vec16<T> load16(const T* p) {
  Vec16<T> v;
  reinterpret_cast<uint4&>(v) = *reinterpret_cast<const uint4*>(p);
  return v;
}

/// A streaming read: the line is not expected to be used again.
template <class T>
__device__ __forceinline__ Vec16<T> load16_once(const T* p) {
  Vec16<T> v;
  reinterpret_cast<uint4&>(v) = __ldcs(reinterpret_cast<const uint4*>(p));
  return v;
}

template <class T>
__device__ __forceinline__ void store16(T* p, const Vec16<T>& v) {
  *reinterpret_cast<uint4*>(p) = reinterpret_cast<const uint4&>(v);
}

template <class T>
struct TypeTag {
  using type = T;
};

/// Calls `f(TypeTag<T>{})` for the element type of `dtype`; false for a value outside the enum.
template <class F>
bool dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      f(TypeTag<float>{});
      return true;
    case DType::float16:
      f(TypeTag<__half>{});
      return true;
    case DType::bfloat16:
      f(TypeTag<__nv_bfloat16>{});
      return true;
  }
  return false;
}

}  // namespace uncomp::kernels
