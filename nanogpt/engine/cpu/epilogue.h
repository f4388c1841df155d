// What becomes of a product's sums on their way to memory.
#pragma once

#include <algorithm>

#include "gelu.h"
#include "panels.h"

namespace nanogpt {

// Bias, GELU, then the residual. y is (rows, outputs), contiguous.
struct Epilogue {
  const float* bias;  // null for none
  Gelu kind;
  const float* residual;  // laid out like y, and may be y; null for none
  float* y;
  int64_t outputs;

  // Takes sums (rows, 32) of a panel whose first output is `output`.
  void operator()(int64_t row, int rows, int64_t output, const float* sums) const {
    const int64_t end = std::min(output + kPanel, outputs);
    for (int r = 0; r < rows; r++)
      for (int64_t n = output; n < end; n += kLanes)
        put(sums + r * kPanel + (n - output), n, (row + r) * outputs + n,
            std::min<int64_t>(kLanes, end - n));
  }

 private:
  void put(const float* sums, int64_t output, int64_t at, int64_t width) const {
    if (width == kLanes) {
      const float* rest = residual ? residual + at : nullptr;
      return store(y + at, value(sums, bias ? bias + output : nullptr, rest));
    }
    alignas(64) float b[kLanes] = {}, rest[kLanes] = {}, result[kLanes];
    if (bias) std::copy_n(bias + output, width, b);
    if (residual) std::copy_n(residual + at, width, rest);
    store(result, value(sums, bias ? b : nullptr, residual ? rest : nullptr));
    std::copy_n(result, width, y + at);
  }

  Vec value(const float* sums, const float* b, const float* rest) const {
    Vec v = load(sums);
    if (b) v = add(v, load(b));
    v = gelu(v, kind);
    return rest ? add(load(rest), v) : v;
  }
};

}  // namespace nanogpt
