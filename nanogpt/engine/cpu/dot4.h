// Sixteen sums of int32, to which products of four neighbouring bytes are added: the integers are
// the same on every machine, with VNNI and without.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace nanogpt {

#if defined(__AVX512F__)

struct Ints32 {
  __m512i x;
};

inline Ints32 load_ints(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(int32_t* p, Ints32 a) { _mm512_storeu_si512(p, a.x); }
inline Vec to_float(Ints32 a) { return {_mm512_cvtepi32_ps(a.x)}; }

#else

typedef int32_t Sixteen __attribute__((vector_size(4 * kLanes)));

struct Ints32 {
  Sixteen x;
};

inline Ints32 load_ints(const void* p) {
  Ints32 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void store_ints(int32_t* p, Ints32 a) { std::memcpy(p, &a, sizeof(a)); }
inline Vec to_float(Ints32 a) {
  alignas(64) float lane[kLanes];
  for (int i = 0; i < kLanes; i++) lane[i] = static_cast<float>(a.x[i]);
  return load(lane);
}

#endif

// The four bytes at p in every lane.
inline Ints32 broadcast4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
#if defined(__AVX512F__)
  return {_mm512_set1_epi32(four)};
#else
  return {Sixteen{} + four};
#endif
}

// sum + a0 b0 + a1 b1 + a2 b2 + a3 b3 in every lane: a of unsigned bytes, b of signed ones.
inline Ints32 dot4(Ints32 a, Ints32 b, Ints32 sum) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(sum.x, a.x, b.x)};
#elif defined(__AVX512BW__)
  const __m512i low = _mm512_set1_epi16(0xff);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a.x, low),
                                         _mm512_srai_epi16(_mm512_slli_epi16(b.x, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a.x, 8), _mm512_srai_epi16(b.x, 8));
  return {_mm512_add_epi32(sum.x, _mm512_add_epi32(even, odd))};
#else
  alignas(64) uint8_t x[4 * kLanes];
  alignas(64) int8_t y[4 * kLanes];
  std::memcpy(x, &a, sizeof(x));
  std::memcpy(y, &b, sizeof(y));
  alignas(64) int32_t s[kLanes];
  std::memcpy(s, &sum, sizeof(s));
  for (int i = 0; i < kLanes; i++)
    for (int k = 4 * i; k < 4 * i + 4; k++) s[i] += x[k] * y[k];
  return load_ints(s);
#endif
}

}  // namespace nanogpt
