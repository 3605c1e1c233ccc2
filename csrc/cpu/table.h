// SPDX-License-Identifier: Apache-2.0
// The table of one copy: included by the files that are compiled for one instruction set each.
#pragma once

#include "cpu/attend.h"
#include "cpu/keys.h"
#include "cpu/loops.h"
#include "cpu/matrix.h"
#include "cpu/rows.h"

namespace uncomp::cpu {
namespace {

/// Runs with `Wide` vectors where they divide the head dims and with `Narrow` ones elsewhere.
template <class Wide, class Narrow, class K, class T>
void attend_any(const Attention& a) {
  if (a.key_dim % Wide::count == 0 && a.value_dim % Wide::count == 0) return attend<Wide, K, T>(a);
  attend<Narrow, K, T>(a);
}

template <class Wide, class Narrow, class T>
void make_keys_any(const MakeKeys& a) {
  if (a.rank % Wide::count == 0 && a.dim % Wide::count == 0) return make_keys<Wide, T>(a);
  make_keys<Narrow, T>(a);
}

template <class Wide, class Narrow, class T>
constexpr OfDType of_dtype() {
  return {&attend_any<Wide, Narrow, T, T>, &attend_any<Wide, Narrow, float, T>, &make_keys_any<Wide, Narrow, T>,
          &logits<Wide, T>, &norms<Narrow, T>};
}

/// Head dims are multiples of 8, so Narrow has at most 8 lanes.
template <class Wide, class Narrow>
constexpr Loops table() {
  return {{of_dtype<Wide, Narrow, float>(), of_dtype<Wide, Narrow, Half>(), of_dtype<Wide, Narrow, BFloat16>()},
          &softmax<Wide>,
          &exp_minus<Wide>,
          &weighted_sum<Wide>,
          &votes<Wide>,
          &turn_ring,
          &smallest_pooled};
}

}  // namespace

/// One function a copy; null in a copy that this build cannot make.
const Loops* baseline_loops();
const Loops* avx2_loops();
const Loops* avx512_loops();

}  // namespace uncomp::cpu
