// SPDX-License-Identifier: Apache-2.0
// The loops for AVX2, FMA and F16C; CMakeLists.txt sets the flags on x86-64.
#include "cpu/table.h"

namespace uncomp::cpu {

const Loops* avx2_loops() {
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  static constexpr Loops kLoops = table<Lanes<8>, Lanes<8>>();
  return &kLoops;
#else
  return nullptr;
#endif
}

}  // namespace uncomp::cpu
