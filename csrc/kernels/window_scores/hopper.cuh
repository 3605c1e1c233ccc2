// SPDX-License-Identifier: Apache-2.0
// Instructions of sm_90a that the streaming kernels use: barriers with transaction phases in shared memory, warpgroup
// products whose first operand lies in registers or shared memory, and the overlap of dependent launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/common/dependent.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/warpgroup.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define UNCOMP_SM90A 1
#else
#define UNCOMP_SM90A 0
#endif

namespace uncomp::kernels {

/// A barrier that flips its phase each time `count` arrivals are complete.
struct PhaseBarrier {
  uint64_t word;

  __device__ __forceinline__ void init(uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&word)), "r"(count) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(shared_address(&word))
                 : "memory");
  }
  /// Arrives when all copies that this thread has started are complete.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(&word)) : "memory");
  }
  /// Returns when the phase of parity `parity` is complete; parity 1 of a fresh barrier counts as complete.
  __device__ __forceinline__ void wait(uint32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                   : "=r"(done)
                   : "r"(shared_address(&word)), "r"(parity)
                   : "memory");
    }
  }
};

#if UNCOMP_SM90A

/// What this thread knows to be written to shared memory becomes visible to its warpgroup products.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

/// Second operand: rows of 128 bytes, swizzled over groups of eight rows; `shared` is 1024-byte aligned.
__device__ __forceinline__ uint64_t wgmma_operand(const void* shared) {
  constexpr uint64_t kGroupBytes = 1024 >> 4, kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kGroupBytes << 32 | uint64_t{1} << 16 | (shared_address(shared) & 0x3ffff) >> 4;
}

#define UNCOMP_WGMMA_16(TYPE)                                                                                       \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                                   \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0;\n}\n"          \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), \
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep))

#define UNCOMP_WGMMA_32(TYPE)                                                                                       \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                   \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"    \
      "%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"                                                  \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), \
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),      \
        "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),     \
        "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep))

/// c[64 x N] = (keep ? c : 0) + a[64 x 16] * b[N x 16]^T, started. c[4 j + 0], [1] are row 16 warp + lane / 4 and
/// columns 8 j + 2 (lane % 4) and + 1; c[4 j + 2], [3] the same columns of row + 8. `a` as in mma_16x8x16.
template <class T, int kCount>
__device__ __forceinline__ void wgmma_start(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b, int keep) {
  constexpr bool kHalf = sizeof(T) == 2 && __is_same(T, __half);
  if constexpr (kCount == 16) {
    if constexpr (kHalf) {
      UNCOMP_WGMMA_16("f16");
    } else {
      UNCOMP_WGMMA_16("bf16");
    }
  } else {
    static_assert(kCount == 32);
    if constexpr (kHalf) {
      UNCOMP_WGMMA_32("f16");
    } else {
      UNCOMP_WGMMA_32("bf16");
    }
  }
}

#define UNCOMP_WGMMA_SHARED_64(TYPE)                                                                                  \
  asm volatile(                                                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                    \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"      \
      "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%" \
      "55,"                                                                                                           \
      "%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, 0, 0;\n}\n"                                               \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]),   \
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),        \
        "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),       \
        "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]),       \
        "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]),       \
        "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]),       \
        "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]),       \
        "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])                     \
      : "l"(a), "l"(b), "r"(keep))

/// The same with 128 columns and both operands in shared memory, the rows of `a` as those of `b`.
template <class T>
__device__ __forceinline__ void wgmma_start(float (&c)[64], uint64_t a, uint64_t b, int keep) {
  if constexpr (__is_same(T, __half)) {
    UNCOMP_WGMMA_SHARED_64("f16");
  } else {
    UNCOMP_WGMMA_SHARED_64("bf16");
  }
}

#undef UNCOMP_WGMMA_16
#undef UNCOMP_WGMMA_32
#undef UNCOMP_WGMMA_SHARED_64

/// Hands registers of a warpgroup back, or takes them, up to `kCount` a thread.
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

template <int kThreads>
__device__ __forceinline__ void named_barrier(int id) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

#endif

}  // namespace uncomp::kernels
