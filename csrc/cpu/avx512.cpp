// SPDX-License-Identifier: Apache-2.0
// The loops for AVX-512; CMakeLists.txt sets the flags on x86-64.
#include "cpu/table.h"

namespace uncomp::cpu {

const Loops* avx512_loops() {
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
  static constexpr Loops kLoops = table<Lanes<16>, Lanes<8>>();
  return &kLoops;
#else
  return nullptr;
#endif
}

}  // namespace uncomp::cpu
