// SPDX-License-Identifier: Apache-2.0
// Argument checks. Each message names the operator, the argument, what was wanted and what came; one reading is
// enough to mend the call. ValueError for values and shapes, TypeError for dtypes, NotImplementedError for limits.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "core/constants.h"
#include "core/dtype.h"
#include "core/math.h"

namespace uncomp {

/// UNCOMP_CHECK_VALUE("select_tokens", pool % 2 == 1, "pool must be odd; got ", pool)
#define UNCOMP_CHECK_VALUE(op, cond, ...) TORCH_CHECK_VALUE(cond, "uncomp::", op, ": ", __VA_ARGS__)
#define UNCOMP_CHECK_TYPE(op, cond, ...) TORCH_CHECK_TYPE(cond, "uncomp::", op, ": ", __VA_ARGS__)
#define UNCOMP_CHECK_LIMIT(op, cond, ...) TORCH_CHECK_NOT_IMPLEMENTED(cond, "uncomp::", op, ": ", __VA_ARGS__)

/// "float16", as Python writes it.
inline std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

inline void check_dtype(const char* op, const char* name, const at::Tensor& t, at::ScalarType wanted) {
  UNCOMP_CHECK_TYPE(op, t.scalar_type() == wanted, name, " must be ", dtype_name(wanted), "; got ",
                    dtype_name(t.scalar_type()));
}

/// float32, float16 or bfloat16.
inline void check_float(const char* op, const char* name, const at::Tensor& t) {
  UNCOMP_CHECK_TYPE(op,
                    t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16,
                    name, " must be float32, float16 or bfloat16; got ", dtype_name(t.scalar_type()));
}

inline void check_same_dtype(const char* op, const char* name, const at::Tensor& t, const char* ref_name,
                             const at::Tensor& ref) {
  UNCOMP_CHECK_TYPE(op, t.scalar_type() == ref.scalar_type(), name, " must have the dtype of ", ref_name, " (",
                    dtype_name(ref.scalar_type()), "); got ", dtype_name(t.scalar_type()));
}

inline void check_device(const char* op, const char* name, const at::Tensor& t, const char* ref_name,
                         const at::Tensor& ref) {
  UNCOMP_CHECK_VALUE(op, t.device() == ref.device(), name, " must be on ", ref.device(), " where ", ref_name,
                     " is; got ", t.device());
}

inline void check_rank(const char* op, const char* name, const at::Tensor& t, int64_t rank, const char* shape) {
  UNCOMP_CHECK_VALUE(op, t.dim() == rank, name, " must have shape ", shape, "; got ", t.sizes());
}

inline void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef wanted,
                        const char* shape) {
  UNCOMP_CHECK_VALUE(op, t.sizes() == wanted, name, " must have shape ", shape, " = ", wanted, "; got ", t.sizes());
}

inline void check_contiguous(const char* op, const char* name, const at::Tensor& t) {
  UNCOMP_CHECK_VALUE(op, t.is_contiguous(), name, " must be contiguous; got strides ", t.strides());
}

/// Channels lie next to each other: what every vector load of a [.., D] tensor needs.
inline void check_last_contiguous(const char* op, const char* name, const at::Tensor& t) {
  UNCOMP_CHECK_VALUE(op, t.size(-1) <= 1 || t.stride(-1) == 1, name,
                     " must be contiguous in its last dimension; got strides ", t.strides());
}

/// An int32 vector or table on the device of `ref`, contiguous, with the given shape.
inline void check_int32(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef wanted,
                        const char* shape, const char* ref_name, const at::Tensor& ref) {
  check_dtype(op, name, t, at::kInt);
  check_device(op, name, t, ref_name, ref);
  check_shape(op, name, t, wanted, shape);
  check_contiguous(op, name, t);
}

inline void check_int32(const char* op, const char* name, const std::optional<at::Tensor>& t, at::IntArrayRef wanted,
                        const char* shape, const char* ref_name, const at::Tensor& ref) {
  if (t.has_value()) check_int32(op, name, *t, wanted, shape, ref_name, ref);
}

/// Every row starts on a 16-byte border, as vector loads need. A slice with an odd offset is refused, not copied.
inline void check_aligned(const char* op, const char* name, const at::Tensor& t) {
  const int64_t bytes = t.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) aligned = aligned && (t.size(d) <= 1 || t.stride(d) * bytes % 16 == 0);
  UNCOMP_CHECK_VALUE(op, aligned || t.numel() == 0, name,
                     " must have rows that start on 16-byte borders (call .contiguous()); got strides ", t.strides(),
                     " at storage offset ", t.storage_offset());
}

/// Head dims that the attention operators take.
inline void check_head_dim(const char* op, const char* name, int64_t dim) {
  UNCOMP_CHECK_LIMIT(op, dim >= kHeadDimMultiple && dim <= kMaxHeadDim && dim % kHeadDimMultiple == 0, name,
                     " must have a head dim that is a multiple of ", kHeadDimMultiple, " and at most ", kMaxHeadDim,
                     "; got ", dim);
}

/// Sizes that kernels count in int32.
inline int32_t check_int32_size(const char* op, const char* name, int64_t size) {
  UNCOMP_CHECK_LIMIT(op, fits<int32_t>(size), name, " must be below 2^31; got ", size);
  return static_cast<int32_t>(size);
}

/// Kernels calculate in float32, where a larger double would be infinite. NaN is not finite.
inline bool finite_in_float32(double value) { return std::abs(value) <= std::numeric_limits<float>::max(); }

inline void check_finite(const char* op, const char* name, double value) {
  UNCOMP_CHECK_VALUE(op, finite_in_float32(value), name, " must be a finite number of float32; got ", value);
}

inline Pool parse_pool(const char* op, std::string_view mode) {
  UNCOMP_CHECK_VALUE(op, mode == "max" || mode == "avg", "pool_mode must be \"max\" or \"avg\"; got \"",
                     std::string(mode), "\"");
  return mode == "max" ? Pool::max : Pool::avg;
}

inline void check_pool_width(const char* op, int64_t pool) {
  UNCOMP_CHECK_VALUE(op, pool >= 1 && pool % 2 == 1, "pool must be odd and at least 1; got ", pool);
  UNCOMP_CHECK_LIMIT(op, pool <= kMaxPool, "pool must be at most ", kMaxPool, "; got ", pool);
}

/// "mean", "sum", "max" or, where `allow_none`, "none".
inline Reduce parse_reduce(const char* op, const char* name, std::string_view mode, bool allow_none) {
  if (mode == "mean") return Reduce::mean;
  if (mode == "sum") return Reduce::sum;
  if (mode == "max") return Reduce::max;
  if (allow_none && mode == "none") return Reduce::none;
  UNCOMP_CHECK_VALUE(op, false, name, " must be \"mean\", \"sum\"",
                     allow_none ? ", \"max\" or \"none\"" : " or \"max\"", "; got \"", std::string(mode), "\"");
}

struct NamedTensor {
  NamedTensor(const char* label, const at::Tensor& t) : name(label), tensor(&t) {}
  NamedTensor(const char* label, const std::optional<at::Tensor>& t)
      : name(label), tensor(t.has_value() ? &*t : nullptr) {}

  const char* name;
  const at::Tensor* tensor;  // null where an optional one is not given
};

/// Bytes from a tensor's first element to its last; what lies between strided elements counts as its own.
struct MemorySpan {
  explicit MemorySpan(const NamedTensor& named) : name(named.name) {
    if (named.tensor == nullptr || named.tensor->numel() == 0) return;
    const at::Tensor& t = *named.tensor;
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    begin = static_cast<const char*>(t.const_data_ptr());
    end = begin + (last + 1) * static_cast<int64_t>(t.element_size());
  }

  bool meets(const MemorySpan& other) const { return begin < other.end && other.begin < end; }

  const char* name;
  const char *begin = nullptr, *end = nullptr;
};

/// No tensor that is written shares memory with another one that is written or read: tasks of a body would see half of
/// what others wrote.
inline void check_apart(const char* op, std::initializer_list<NamedTensor> written,
                        std::initializer_list<NamedTensor> read) {
  c10::SmallVector<MemorySpan, 8> spans;
  const auto check = [&](const MemorySpan& span) {
    for (const MemorySpan& earlier : spans) {
      UNCOMP_CHECK_VALUE(op, !span.meets(earlier), span.name, " must not share memory with ", earlier.name,
                         "; both are one storage");
    }
  };
  for (const NamedTensor& named : written) {
    const MemorySpan span(named);
    check(span);
    spans.push_back(span);
  }
  for (const NamedTensor& named : read) check(MemorySpan(named));
}

inline DType kernel_dtype(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      TORCH_CHECK_TYPE(false, "uncomp: no kernel for dtype ", dtype_name(t.scalar_type()));
  }
}

template <class T>
const T* data_or_null(const std::optional<at::Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace uncomp
