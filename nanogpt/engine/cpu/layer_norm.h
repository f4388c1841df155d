// LayerNorm of one row: lane i sums elements i, i + 16, ... in turn, whatever other rows there are.
#pragma once

#include <cmath>

#include "vec.h"

namespace nanogpt {

// `bias` may be null; y may be x.
inline void layer_norm(const float* x, int64_t size, const float* weight, const float* bias,
                       float eps, float* y) {
  const int64_t whole = size / kLanes * kLanes, rest = size - whole;
  alignas(64) float last[kLanes] = {};
  for (int64_t i = 0; i < rest; i++) last[i] = x[whole + i];
  Vec sum = load(last);
  for (int64_t i = 0; i < whole; i += kLanes) sum = add(sum, load(x + i));
  const float mean = sum_lanes(sum) / size;
  const Vec shift = broadcast(mean);
  for (int64_t i = rest; i < kLanes; i++) last[i] = mean;
  const Vec end = sub(load(last), shift);
  Vec squares = mul(end, end);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec d = sub(load(x + i), shift);
    squares = fma(d, d, squares);
  }
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / size + eps);
  const Vec s = broadcast(scale);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec n = mul(sub(load(x + i), shift), s);
    store(y + i, bias ? fma(n, load(weight + i), load(bias + i)) : mul(n, load(weight + i)));
  }
  for (int64_t i = whole; i < size; i++) {
    const float n = (x[i] - mean) * scale;
    y[i] = bias ? n * weight[i] + bias[i] : n * weight[i];
  }
}

}  // namespace nanogpt
