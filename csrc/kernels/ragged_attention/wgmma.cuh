// SPDX-License-Identifier: Apache-2.0
// Matrix instructions of a warpgroup (sm_90a), one thin function each. Kernels that use them have a body on that
// architecture only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/common/warpgroup.cuh"

namespace uncomp::kernels {

/// c[64 x 2N] = A * B, or += where `add`, over 16 summed numbers: row-wise operands from shared memory.
template <class T>
__device__ __forceinline__ void product_rows(float (&c)[64], uint64_t a, uint64_t b, bool add);
template <class T>
__device__ __forceinline__ void product_rows(float (&c)[32], uint64_t a, uint64_t b, bool add);

/// c[64 x 2N] += A * B: A from registers, laid out as in mma.sync m16n8k16 for each warp's 16 rows, B column-wise from
/// shared memory.
template <class T>
__device__ __forceinline__ void product_columns(float (&c)[64], const uint32_t (&a)[4], uint64_t b);
template <class T>
__device__ __forceinline__ void product_columns(float (&c)[32], const uint32_t (&a)[4], uint64_t b);

// Sums of a product, 32 or 64 a thread: their names in an instruction's text and the numbers they stand for.
#define UNCOMP_NAMES_32                                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define UNCOMP_NAMES_64                                                                                         \
  UNCOMP_NAMES_32                                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define UNCOMP_SUMS_32(c)                                                                                     \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), \
      "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),  \
      "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), \
      "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
#define UNCOMP_SUMS_64(c)                                                                                       \
  UNCOMP_SUMS_32(c), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), \
      "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]),   \
      "+f"(c[47]), "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]),   \
      "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]),   \
      "+f"(c[63])

// An instruction of the two half-precision types; `type` is the one in its text.
#define UNCOMP_PRODUCTS(T, type)                                                                                  \
  template <>                                                                                                     \
  __device__ __forceinline__ void product_rows<T>(float(&c)[64], uint64_t a, uint64_t b, bool add) {              \
    asm volatile("{ .reg .pred more; setp.ne.b32 more, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type \
                 "." type " {" UNCOMP_NAMES_64 "}, %64, %65, more, 1, 1, 0, 0; }\n"                               \
                 : UNCOMP_SUMS_64(c)                                                                              \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                   \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ __forceinline__ void product_columns<T>(float(&c)[64], const uint32_t(&a)[4], uint64_t b) {          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" UNCOMP_NAMES_64                \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                                                    \
                 : UNCOMP_SUMS_64(c)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ __forceinline__ void product_rows<T>(float(&c)[32], uint64_t a, uint64_t b, bool add) {              \
    asm volatile("{ .reg .pred more; setp.ne.b32 more, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type  \
                 "." type " {" UNCOMP_NAMES_32 "}, %32, %33, more, 1, 1, 0, 0; }\n"                               \
                 : UNCOMP_SUMS_32(c)                                                                              \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                   \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ __forceinline__ void product_columns<T>(float(&c)[32], const uint32_t(&a)[4], uint64_t b) {          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" UNCOMP_NAMES_32                 \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                                                    \
                 : UNCOMP_SUMS_32(c)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
  }

UNCOMP_PRODUCTS(__half, "f16")
UNCOMP_PRODUCTS(__nv_bfloat16, "bf16")

#undef UNCOMP_PRODUCTS
#undef UNCOMP_SUMS_64
#undef UNCOMP_SUMS_32
#undef UNCOMP_NAMES_64
#undef UNCOMP_NAMES_32

}  // namespace uncomp::kernels
