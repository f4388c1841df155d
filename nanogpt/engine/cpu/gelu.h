// GELU, exact and in its tanh form, lane by lane. Both are x times a share in 0..1 of which the
// smaller side is computed from e^-something, so nothing cancels.
#pragma once

#include "vec.h"

namespace nanogpt {

enum class Gelu { kNone, kExact, kTanh };

// x Phi(x), where Phi(-|x|) = e^(-x^2/2) times a smooth function of t = 1 / (1 + 0.3 |x| / sqrt 2).
// The polynomial in t was fitted by least squares, reweighted until its error was even: 2e-8.
inline Vec gelu_exact(Vec x) {
  const Vec size = max(x, sub(broadcast(0.0f), x));
  const Vec t =
      div(broadcast(1.0f), fma(size, broadcast(0.21213203f), broadcast(1.0f)));
  Vec p = broadcast(-0.064703397f);
  p = fma(p, t, broadcast(0.24247643f));
  p = fma(p, t, broadcast(-0.2554512f));
  p = fma(p, t, broadcast(0.27299303f));
  p = fma(p, t, broadcast(-0.04665795f));
  p = fma(p, t, broadcast(0.10714221f));
  p = fma(p, t, broadcast(0.07426348f));
  p = fma(p, t, broadcast(0.08534234f));
  p = fma(p, t, broadcast(0.08459506f));
  const Vec e = exp_nonpositive(mul(mul(size, size), broadcast(-0.5f)));
  const Vec tail = mul(e, mul(p, t));  // Phi(-|x|)
  return mul(x, select(x, 0.0f, sub(broadcast(1.0f), tail), tail));
}

// x / (1 + e^(-2u)), which is x (1 + tanh u) / 2, u = sqrt(2/pi) (x + 0.044715 x^3).
inline Vec gelu_tanh(Vec x) {
  const Vec inner = fma(mul(mul(x, x), broadcast(0.044715f)), x, x);
  const Vec size = max(inner, sub(broadcast(0.0f), inner));
  const Vec e = exp_nonpositive(mul(size, broadcast(-1.5957691f)));
  const Vec share = div(broadcast(1.0f), add(broadcast(1.0f), e));
  return mul(x, select(x, 0.0f, share, mul(e, share)));
}

inline Vec gelu(Vec x, Gelu kind) {
  return kind == Gelu::kNone ? x : kind == Gelu::kExact ? gelu_exact(x) : gelu_tanh(x);
}

}  // namespace nanogpt
