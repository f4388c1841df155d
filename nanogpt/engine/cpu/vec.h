// Sixteen float lanes, whatever the machine: one AVX-512 register, two of AVX2, or what the compiler
// makes of them. Every operation works lane by lane and rounds once, in the same order everywhere,
// so that all machines with fused multiply-add give the same bits.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#endif

namespace nanogpt {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

constexpr int kMaxRows = 8;  // rows of a register tile: 8 x 2 sums of 32 registers
constexpr int kMaxSums = 16;

struct Vec {
  __m512 x;
};

inline Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const c10::BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const c10::Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
// Sixteen pairs of neighbours: the first of each, and the second of each.
inline void load_pairs(const c10::BFloat16* p, Vec& first, Vec& second) {
  const __m512i pairs = _mm512_loadu_si512(p);
  first.x = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second.x = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
// a where x >= bound or x is NaN, else b (or 0).
inline Vec select(Vec x, float bound, Vec a, Vec b) {
  return {_mm512_mask_mov_ps(
      b.x, _mm512_cmp_ps_mask(x.x, _mm512_set1_ps(bound), _CMP_NLT_UQ), a.x)};
}
inline Vec zero_below(Vec x, float bound, Vec a) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.x, _mm512_set1_ps(bound), _CMP_NLT_UQ);
  return {_mm512_maskz_mov_ps(keep, a.x)};
}
// A bit for each lane of at least `bound`; for numbers only.
inline uint32_t lanes_from(Vec x, float bound) {
  return _mm512_cmp_ps_mask(x.x, _mm512_set1_ps(bound), _CMP_GE_OQ);
}
// 2^n, where the low bits of `magic` (n + 1.5 * 2^23) hold the integer n.
inline Vec power_of_two(Vec magic) {
  const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(magic.x), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f800000)))};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int kMaxRows = 4;  // 4 x 1 sums of two registers each, of 16 registers
constexpr int kMaxSums = 4;

struct Vec {
  __m256 x, y;
};

inline Vec broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load(const c10::BFloat16* p) {
  const __m128i* q = (const __m128i*)p;
  return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}
inline Vec load(const c10::Half* p) {
  const __m128i* q = (const __m128i*)p;
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline void split(__m256i pairs, __m256& first, __m256& second) {
  first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}
inline void load_pairs(const c10::BFloat16* p, Vec& first, Vec& second) {
  split(_mm256_loadu_si256((const __m256i*)p), first.x, second.x);
  split(_mm256_loadu_si256((const __m256i*)(p + kLanes)), first.y, second.y);
}
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.x);
  _mm256_storeu_ps(p + 8, a.y);
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x), _mm256_add_ps(a.y, b.y)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x), _mm256_sub_ps(a.y, b.y)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x), _mm256_mul_ps(a.y, b.y)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x), _mm256_div_ps(a.y, b.y)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x), _mm256_max_ps(a.y, b.y)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.x, b.x, c.x), _mm256_fmadd_ps(a.y, b.y, c.y)};
}
inline Vec select(Vec x, float bound, Vec a, Vec b) {
  const __m256 t = _mm256_set1_ps(bound);
  return {_mm256_blendv_ps(b.x, a.x, _mm256_cmp_ps(x.x, t, _CMP_NLT_UQ)),
          _mm256_blendv_ps(b.y, a.y, _mm256_cmp_ps(x.y, t, _CMP_NLT_UQ))};
}
inline Vec zero_below(Vec x, float bound, Vec a) {
  const __m256 b = _mm256_set1_ps(bound);
  return {_mm256_and_ps(_mm256_cmp_ps(x.x, b, _CMP_NLT_UQ), a.x),
          _mm256_and_ps(_mm256_cmp_ps(x.y, b, _CMP_NLT_UQ), a.y)};
}
inline uint32_t lanes_from(Vec x, float bound) {
  const __m256 b = _mm256_set1_ps(bound);
  return _mm256_movemask_ps(_mm256_cmp_ps(x.x, b, _CMP_GE_OQ)) |
         _mm256_movemask_ps(_mm256_cmp_ps(x.y, b, _CMP_GE_OQ)) << 8;
}
inline __m256 power_of_two(__m256 magic) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(magic), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f800000)));
}
inline Vec power_of_two(Vec magic) { return {power_of_two(magic.x), power_of_two(magic.y)}; }

#else  // the vectors of GCC and Clang, in whatever registers there are

constexpr int kMaxRows = 4;
constexpr int kMaxSums = 4;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

struct Vec {
  Floats x;
};

inline Vec broadcast(float a) { return {Floats{} + a}; }
inline Vec load(const float* p) {
  Vec r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
template <typename T>
inline Vec load(const T* p) {
  alignas(64) float lane[kLanes];
  for (int i = 0; i < kLanes; i++) lane[i] = static_cast<float>(p[i]);
  return load(lane);
}
inline void load_pairs(const c10::BFloat16* p, Vec& first, Vec& second) {
  for (int i = 0; i < kLanes; i++) {
    first.x[i] = static_cast<float>(p[2 * i]);
    second.x[i] = static_cast<float>(p[2 * i + 1]);
  }
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof(a)); }
inline Vec add(Vec a, Vec b) { return {a.x + b.x}; }
inline Vec sub(Vec a, Vec b) { return {a.x - b.x}; }
inline Vec mul(Vec a, Vec b) { return {a.x * b.x}; }
inline Vec div(Vec a, Vec b) { return {a.x / b.x}; }
inline Vec max(Vec a, Vec b) { return {a.x > b.x ? a.x : b.x}; }
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; i++) c.x[i] = __builtin_fmaf(a.x[i], b.x[i], c.x[i]);
  return c;
#else  // built with -ffp-contract=off: always two roundings
  return {a.x * b.x + c.x};
#endif
}
inline Vec select(Vec x, float bound, Vec a, Vec b) { return {x.x < bound ? b.x : a.x}; }
inline Vec zero_below(Vec x, float bound, Vec a) { return {x.x < bound ? Floats{} : a.x}; }
inline uint32_t lanes_from(Vec x, float bound) {
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes; i++) lanes |= uint32_t{x.x[i] >= bound} << i;
  return lanes;
}
inline Vec power_of_two(Vec magic) {
  const Ints power = ((Ints)magic.x << 23) + 0x3f800000;
  return {(Floats)power};
}

#endif

// e^x for x <= 0, within 1 ulp; 0 below -87.33, where the result would leave the normal numbers.
// Cody and Waite's reduction to |r| <= ln(2)/2 with ln 2 in two parts, then a polynomial of
// degree 6 in r (near-minimax, constant and linear term exactly 1).
inline Vec exp_nonpositive(Vec x) {
  const Vec magic = fma(x, broadcast(1.44269504f), broadcast(12582912.0f));
  const Vec n = sub(magic, broadcast(12582912.0f));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.38145406e-3f);
  p = fma(p, r, broadcast(8.36874545e-3f));
  p = fma(p, r, broadcast(4.16683890e-2f));
  p = fma(p, r, broadcast(1.66665211e-1f));
  p = fma(p, r, broadcast(4.99999940e-1f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return zero_below(x, -87.33f, mul(p, power_of_two(magic)));
}

// Sum and maximum over the lanes, by halves.
inline float sum_lanes(Vec a) {
  alignas(64) float lane[kLanes];
  store(lane, a);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}
inline float max_lanes(Vec a) {
  alignas(64) float lane[kLanes];
  store(lane, a);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

}  // namespace nanogpt
