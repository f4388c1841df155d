// A row of logits, sixteen tokens at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vec.h"

namespace nanogpt {

constexpr int kBlock = 128;  // tokens whose shares or exponentials are summed first

inline int blocks_of(int size) { return (size + kBlock - 1) / kBlock; }

// f(first token, its 16 logits) for tokens begin..end-1, with minus infinity behind the last one of
// the row; `begin` is a multiple of 16.
template <typename T, typename F>
inline void for_vectors(const T* logits, int size, int begin, int end, const F& f) {
  int i = begin;
  for (const int whole = std::min(end, size / kLanes * kLanes); i < whole; i += kLanes)
    f(i, load(logits + i));
  for (; i < end; i += kLanes) {
    alignas(64) float lane[kLanes];
    for (int j = 0; j < kLanes; j++)
      lane[j] = i + j < size ? static_cast<float>(logits[i + j]) : -INFINITY;
    f(i, load(lane));
  }
}

// 1 in each lane that is no logit (NaN or infinity), else 0.
inline Vec not_a_logit(Vec x) { return zero_below(x, INFINITY, broadcast(1.0f)); }

}  // namespace nanogpt
