// SPDX-License-Identifier: Apache-2.0
// Which copy of the loops this machine runs.
#include "cpu/loops.h"

#include <cstdlib>
#include <string_view>

namespace uncomp::cpu {

const Loops* baseline_loops();
const Loops* avx2_loops();
const Loops* avx512_loops();

namespace {

bool machine_has(InstructionSet set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (set == InstructionSet::avx2) return avx2;
  if (set == InstructionSet::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return set == InstructionSet::baseline;
}

const Loops& chosen() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = wanted == nullptr ? "" : wanted;
  const Loops* best = loops_for(InstructionSet::baseline);
  if (most == "default") return *best;
  if (const Loops* better = loops_for(InstructionSet::avx2)) best = better;
  if (most == "avx2") return *best;
  if (const Loops* better = loops_for(InstructionSet::avx512)) best = better;
  return *best;
}

}  // namespace

const Loops* loops_for(InstructionSet set) {
  if (!machine_has(set)) return nullptr;
  switch (set) {
    case InstructionSet::avx2:
      return avx2_loops();
    case InstructionSet::avx512:
      return avx512_loops();
    default:
      return baseline_loops();
  }
}

const Loops& loops() {
  static const Loops& best = chosen();
  return best;
}

}  // namespace uncomp::cpu
