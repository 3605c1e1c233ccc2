// SPDX-License-Identifier: Apache-2.0
// The loops for every machine that the compiler's default flags serve.
#include "cpu/table.h"

namespace uncomp::cpu {

const Loops* baseline_loops() {
  static constexpr Loops kLoops = table<Lanes<4>, Lanes<4>>();
  return &kLoops;
}

}  // namespace uncomp::cpu
