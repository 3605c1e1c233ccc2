// SPDX-License-Identifier: Apache-2.0
// Vectors of L floats in the compilers' own notation (GCC and clang): loads that widen to float32, exp, horizontal
// sums. All names have internal linkage: the loops are compiled once an instruction set, and a function that two copies
// shared by name would be linked from either of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace uncomp::cpu {
namespace {

/// Elements as they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

template <int L>
struct Lanes;

#define UNCOMP_LANES(L)                                         \
  template <>                                                   \
  struct Lanes<L> {                                             \
    static constexpr int count = L;                             \
    typedef float Float __attribute__((vector_size(L * 4)));    \
    typedef int32_t Int __attribute__((vector_size(L * 4)));    \
    typedef uint32_t Uint __attribute__((vector_size(L * 4)));  \
    typedef uint16_t Short __attribute__((vector_size(L * 2))); \
  }
UNCOMP_LANES(4);
#if defined(__AVX2__)
UNCOMP_LANES(8);
#endif
#if defined(__AVX512F__)
UNCOMP_LANES(16);
#endif
#undef UNCOMP_LANES

template <class Vector, class T>
[[gnu::always_inline]] inline Vector read(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class Vector, class T>
[[gnu::always_inline]] inline void write(T* to, const Vector& v) {
  std::memcpy(to, &v, sizeof(v));
}

// ---- widening loads
template <class V>
[[gnu::always_inline]] inline typename V::Float load(const float* from) {
  return read<typename V::Float>(from);
}

template <class V>
[[gnu::always_inline]] inline typename V::Float load(const BFloat16* from) {
#if defined(__AVX512F__)
  if constexpr (V::count == 16)
    return (typename V::Float)(_mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(from)) << 16);
#endif
#if defined(__AVX2__)
  if constexpr (V::count == 8)
    return (typename V::Float)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(from)), 16);
#endif
  return (typename V::Float)(__builtin_convertvector(read<typename V::Short>(from), typename V::Uint) << 16);
}

template <class V>
[[gnu::always_inline]] inline typename V::Float load(const Half* from) {
#if defined(__AVX512F__)
  if constexpr (V::count == 16) return (typename V::Float)_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(from));
#endif
#if defined(__F16C__)
  if constexpr (V::count == 8) return (typename V::Float)_mm256_cvtph_ps(read<__m128i>(from));
#endif
  // 2^112 moves the exponent from half's bias to float's, subnormal numbers included; inf and NaN get all ones.
  typedef typename V::Uint Uint;
  const Uint half = __builtin_convertvector(read<typename V::Short>(from), Uint);
  const Uint magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  const Uint finite = (Uint)((typename V::Float)magnitude * 0x1p112f);
  const Uint special = (Uint)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (typename V::Float)(finite | special | sign);
}

// ---- arithmetic
/// Keeps a value that several products share in a register; the compiler would load it again for each of them.
template <class Vector>
[[gnu::always_inline]] inline void keep(Vector& v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

/// Larger of both, `b` where `a` is NaN.
template <class Vector>
[[gnu::always_inline]] inline Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

/// e^x to 2 units in the last place; 0 below -87.3 and inf above 88.3; NaN stays NaN.
template <class V>
[[gnu::always_inline]] inline typename V::Float exp_of(typename V::Float x) {
  typedef typename V::Float Float;
  typedef typename V::Uint Uint;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Float shifted = x * 1.44269504088896341f + round;
  const Float n = shifted - round;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n * ln 2, in two parts
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Float y = p * (r * r) + (r + 1.0f);
  const Float power = (Float)(((Uint)shifted << 23) + (127u << 23));
  const Float zero = {}, infinite = zero + __builtin_inff();
  const Float scaled = x < -87.3f ? zero : y * power;
  return x > 88.3f ? infinite : scaled;
}

// ---- across lanes
/// Halves added until four lanes are left.
[[gnu::always_inline]] inline Float4 fold(Float4 v) { return v; }
#if defined(__AVX2__)
[[gnu::always_inline]] inline Float4 fold(Lanes<8>::Float v) {
  Float4 half[2];
  std::memcpy(half, &v, sizeof(v));
  return half[0] + half[1];
}
#endif
#if defined(__AVX512F__)
[[gnu::always_inline]] inline Float4 fold(Lanes<16>::Float v) {
  Lanes<8>::Float half[2];
  std::memcpy(half, &v, sizeof(v));
  return fold(half[0] + half[1]);
}
#endif

#if defined(__clang__)
#define UNCOMP_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define UNCOMP_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Int4{i, j, k, l})
#endif

/// Sum of the lanes of each of four vectors.
[[gnu::always_inline]] inline Float4 sums_of(Float4 a, Float4 b, Float4 c, Float4 d) {
  const Float4 ab = UNCOMP_SHUFFLE(a, b, 0, 4, 1, 5) + UNCOMP_SHUFFLE(a, b, 2, 6, 3, 7);
  const Float4 cd = UNCOMP_SHUFFLE(c, d, 0, 4, 1, 5) + UNCOMP_SHUFFLE(c, d, 2, 6, 3, 7);
  return UNCOMP_SHUFFLE(ab, cd, 0, 1, 4, 5) + UNCOMP_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

/// A 4 x 4 block with rows and columns exchanged.
[[gnu::always_inline]] inline void transpose(Float4 (&m)[4]) {
  const Float4 a = UNCOMP_SHUFFLE(m[0], m[1], 0, 4, 1, 5), b = UNCOMP_SHUFFLE(m[0], m[1], 2, 6, 3, 7);
  const Float4 c = UNCOMP_SHUFFLE(m[2], m[3], 0, 4, 1, 5), d = UNCOMP_SHUFFLE(m[2], m[3], 2, 6, 3, 7);
  m[0] = UNCOMP_SHUFFLE(a, c, 0, 1, 4, 5);
  m[1] = UNCOMP_SHUFFLE(a, c, 2, 3, 6, 7);
  m[2] = UNCOMP_SHUFFLE(b, d, 0, 1, 4, 5);
  m[3] = UNCOMP_SHUFFLE(b, d, 2, 3, 6, 7);
}

#undef UNCOMP_SHUFFLE

template <class Vector>
[[gnu::always_inline]] inline float sum_lanes(Vector v) {
  const Float4 four = fold(v);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <class V>
[[gnu::always_inline]] inline float largest_lane(typename V::Float v) {
  float most = v[0];
  for (int i = 1; i < V::count; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

}  // namespace
}  // namespace uncomp::cpu
