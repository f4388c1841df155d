// Products in eight bits: weights q with a scale for each output, rows quantised as they come with
// a scale each, both symmetric; the sums are of integers, and exact.
//
// VNNI multiplies unsigned by signed bytes, so a row is kept as q + 128, and a sum starts at
// -128 times the sum of its weights. A panel's header holds these starts (32 int32), then the
// scales of its outputs (32 float32).
#pragma once

#include <cmath>

#include "product.h"

namespace nanogpt {

// The largest magnitude of n numbers.
inline float largest(const float* x, int64_t n) {
  Vec top = broadcast(0.0f);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec v = load(x + i);
    top = max(top, max(v, sub(broadcast(0.0f), v)));
  }
  float result = max_lanes(top);
  for (int64_t i = whole; i < n; i++) result = std::max(result, std::fabs(x[i]));
  return result;
}

// x / scale to the nearest integer, ties to even, for |x / scale| <= 127: by adding 1.5 * 2^23, in
// whose float the last bits are the integer.
inline int32_t nearest(float x, float inverse) {
  const float shifted = x * inverse + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

inline float inverse_of(float top) { return top > 0 ? 127.0f / top : 0.0f; }

// One row of `size` numbers as q + 128, up to `padded` of them; returns its scale.
inline float quantize_row(const float* x, int64_t size, int64_t padded, uint8_t* q) {
  const float top = largest(x, size), inverse = inverse_of(top);
  for (int64_t i = 0; i < size; i++) q[i] = static_cast<uint8_t>(nearest(x[i], inverse) + 128);
  std::fill(q + size, q + padded, uint8_t{128});
  return top / 127.0f;
}

// Packs weight (outputs, inputs) into panels begin..end-1.
template <typename T>
void pack_int8(const T* weight, int64_t outputs, int64_t inputs, int64_t begin, int64_t end,
               int8_t* packed) {
  const int64_t padded = (inputs + 3) / 4 * 4, size = panel_size<int8_t>(padded);
  Buffer<float> row;
  for (int64_t p = begin; p < end; p++) {
    int8_t* panel = packed + p * size;
    std::fill_n(panel, size, int8_t{0});
    for (int64_t n = 0; n < std::min<int64_t>(kPanel, outputs - p * kPanel); n++) {
      float* w = row.room(inputs);
      for (int64_t k = 0; k < inputs; k++)
        w[k] = static_cast<float>(weight[(p * kPanel + n) * inputs + k]);
      const float top = largest(w, inputs), inverse = inverse_of(top), scale = top / 127.0f;
      int32_t start = 0;
      for (int64_t k = 0; k < inputs; k++) {
        const int32_t q = nearest(w[k], inverse);
        panel[kHeader<int8_t> + (k / 4 * kPanel + n) * 4 + k % 4] = static_cast<int8_t>(q);
        start -= 128 * q;
      }
      std::memcpy(panel + n * 4, &start, 4);
      std::memcpy(panel + kPanel * 4 + n * 4, &scale, 4);
    }
  }
}

}  // namespace nanogpt
