// One token from a row of logits, by inverse transform sampling (see inverse_cdf.py, which has the
// same definitions in torch):
//
//   share  exp((logit - greatest logit) / temperature), float32, rounded to a grid on which the
//          sum of a whole vocabulary is exact in double, in whatever order; 1 for the likeliest
//   rank   by share, equal ones by id, lower first
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ranking.h"
#include "row.h"

namespace nanogpt {

constexpr int64_t kNoToken = -1;

struct Wanted {
  double uniform;  // in [0, 1)
  float scale;     // 1 / temperature; 0 means greedy
  Filters filters;
};

// Added and taken away again, it rounds a share to the grid: multiples of magic / 2^23.
inline float rounding_magic(int vocab_size) {
  int bits = 0;
  while (vocab_size >> bits) bits++;
  return std::ldexp(1.0f, std::max(bits - 30, -23));
}

class Sampler {
 public:
  template <typename T>
  int64_t sample(const T* logits, int size, const Wanted& wanted) {
    size_ = size;
    magic_ = rounding_magic(size);
    if (!find_greatest(logits)) return kNoToken;
    if (wanted.scale == 0) return first_of(logits, greatest_);
    if (wanted.filters.any()) return draw_filtered(logits, wanted);
    return draw(wanted.uniform, [&](int block, float* shares) {
      fill_shares(logits, block, wanted.scale, shares);
    });
  }

 private:
  // Whether there is a distribution: no NaN, no infinity, and some token.
  template <typename T>
  bool find_greatest(const T* logits) {
    Vec most = broadcast(-INFINITY), bad = broadcast(0.0f);
    for_vectors(logits, size_, 0, size_, [&](int, Vec x) {
      most = max(most, x);
      bad = max(bad, not_a_logit(x));
    });
    greatest_ = max_lanes(most);
    return max_lanes(bad) == 0 && greatest_ > -INFINITY;
  }

  template <typename T>
  int64_t first_of(const T* logits, float value) const {
    for (int begin = 0; begin < size_; begin += kBlock) {
      const int end = std::min(size_, begin + kBlock);
      bool is_there = false;
      for (int i = begin; i < end; i++) is_there |= static_cast<float>(logits[i]) == value;
      for (int i = begin; is_there; i++)
        if (static_cast<float>(logits[i]) == value) return i;
    }
    return kNoToken;
  }

  // Shares of a block's 128 tokens; 0 behind the last token.
  template <typename T>
  void fill_shares(const T* logits, int block, float scale, float* shares) const {
    const Vec most = broadcast(greatest_), factor = broadcast(scale), magic = broadcast(magic_);
    const int first = block * kBlock;
    for_vectors(logits, size_, first, first + kBlock, [&](int i, Vec x) {
      const Vec e = exp_nonpositive(mul(sub(x, most), factor));
      store(shares + i - first, sub(add(e, magic), magic));
    });
  }

  static double sum_of(const float* shares) {
    double sum[kLanes] = {};
    for (int i = 0; i < kBlock; i += kLanes)
      for (int j = 0; j < kLanes; j++) sum[j] += shares[i + j];
    double total = 0;
    for (double each : sum) total += each;
    return total;
  }

  // The token in whose interval uniform * total lies. `fill(block, shares)` gives shares of 128.
  template <typename F>
  int64_t draw(double uniform, const F& fill) {
    alignas(64) float shares[kBlock];
    const int count = blocks_of(size_);
    ends_.resize(count);
    double total = 0;
    for (int block = 0; block < count; block++) {
      fill(block, shares);
      ends_[block] = total += sum_of(shares);
    }
    const double target = std::min(uniform * total, std::nextafter(total, 0.0));
    int block = 0;
    while (ends_[block] <= target) block++;
    fill(block, shares);
    int i = 0;
    for (double end = block ? ends_[block - 1] : 0; (end += shares[i]) <= target;) i++;
    return int64_t{block} * kBlock + i;
  }

  template <typename T>
  int64_t draw_filtered(const T* logits, const Wanted& wanted) {
    ranking_.resize(blocks_of(size_));
    for (int block = 0; block < blocks_of(size_); block++) {
      fill_shares(logits, block, wanted.scale, ranking_.block(block));
      ranking_.note_greatest(block);
    }
    const Cut cut = ranking_.cut(wanted.filters);
    return draw(wanted.uniform, [&](int block, float* shares) {
      ranking_.keep(block, cut, shares);
    });
  }

  int size_ = 0;
  float greatest_ = 0, magic_ = 0;
  std::vector<double> ends_;  // sums up to the end of each block
  Ranking ranking_;
};

}  // namespace nanogpt
