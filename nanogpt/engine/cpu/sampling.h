// One token from a row of logits, by inverse transform sampling (see inverse_cdf.py, which has the
// same definitions in torch):
//
//   share  exp((logit - greatest logit) / temperature), float32, rounded to a grid on which the
//          sum of a whole vocabulary is exact in double, in whatever order; 1 for the likeliest
//   rank   by share, equal ones by id, lower first
//
// Filters keep a beginning of the ranking. It is found without sorting: shares are not negative,
// so their bits order them, and three rounds of ten bits find the value at which the count or the
// sum reaches its limit (radix select).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vec.h"

namespace nanogpt {

constexpr int64_t kNoToken = -1;
constexpr int kBlock = 128;  // tokens whose shares are summed first
constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

struct Wanted {
  double uniform;     // in [0, 1)
  float scale;        // 1 / temperature; 0 means greedy
  int64_t top_k;      // 0: all
  double top_p;       // 1: all
  float min_p;        // 0: all
  bool is_filtered() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

inline int32_t bits_of(float share) {
  int32_t bits;
  std::memcpy(&bits, &share, sizeof bits);
  return bits;
}

inline float share_of(int32_t bits) {
  float share;
  std::memcpy(&share, &bits, sizeof share);
  return share;
}

// Added and taken away again, it rounds a share to the grid: multiples of magic / 2^23.
inline float rounding_magic(int vocab_size) {
  int bits = 0;
  while (vocab_size >> bits) bits++;
  return std::ldexp(1.0f, std::max(bits - 30, -23));
}

// What is kept of a ranking: shares above `bits`, and of those equal to it ids up to `last_id`.
struct Cut {
  int32_t bits;
  int32_t last_id;
  double sum;  // of the shares that are kept
};

class Sampler {
 public:
  template <typename T>
  int64_t sample(const T* logits, int size, const Wanted& wanted) {
    size_ = size;
    magic_ = rounding_magic(size);
    if (!find_greatest(logits)) return kNoToken;
    if (wanted.scale == 0) return first_of(logits, greatest_);
    if (wanted.is_filtered()) return draw_filtered(logits, wanted);
    return draw(wanted.uniform, [&](int block, float* shares) {
      fill_shares(logits, block, wanted.scale, shares);
    });
  }

 private:
  static constexpr int kBits = 10;  // of a share's 30 that differ, by round
  static constexpr int kBins = 1 << kBits;
  struct Bin {
    int64_t count;
    double sum;
  };

  int num_blocks() const { return (size_ + kBlock - 1) / kBlock; }

  // f(first token, its 16 logits), with minus infinity behind the last one.
  template <typename T, typename F>
  void for_vectors(const T* logits, int begin, int end, const F& f) const {
    int i = begin;
    for (const int whole = std::min(end, size_ / kLanes * kLanes); i < whole; i += kLanes)
      f(i, load(logits + i));
    for (; i < end; i += kLanes) {
      alignas(64) float lane[kLanes];
      for (int j = 0; j < kLanes; j++)
        lane[j] = i + j < size_ ? static_cast<float>(logits[i + j]) : -INFINITY;
      f(i, load(lane));
    }
  }

  // Whether there is a distribution: no NaN, no infinity, and some token.
  template <typename T>
  bool find_greatest(const T* logits) {
    Vec most = broadcast(-INFINITY), bad = broadcast(0.0f);
    const Vec one = broadcast(1.0f);
    for_vectors(logits, 0, size_, [&](int, Vec x) {
      most = max(most, x);
      bad = max(bad, zero_below(x, INFINITY, one));  // also of NaN
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
    for_vectors(logits, first, first + kBlock, [&](int i, Vec x) {
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
    const int count = num_blocks();
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
    const int count = num_blocks();
    shares_.resize(int64_t{count} * kBlock);
    most_.resize(count);
    for (int block = 0; block < count; block++) {
      float* shares = shares_.data() + int64_t{block} * kBlock;
      fill_shares(logits, block, wanted.scale, shares);
      most_[block] = greatest_of(shares);
    }
    const Cut cut = find_cut(wanted);
    return draw(wanted.uniform, [&](int block, float* shares) {
      const float* all = shares_.data() + int64_t{block} * kBlock;
      for (int i = 0; i < kBlock; i++) {
        const int32_t bits = bits_of(all[i]);
        const bool is_kept =
            (bits > cut.bits) | ((bits == cut.bits) & (block * kBlock + i <= cut.last_id));
        shares[i] = is_kept ? all[i] : 0.0f;
      }
    });
  }

  static float greatest_of(const float* shares) {
    Vec most = load(shares);
    for (int i = kLanes; i < kBlock; i += kLanes) most = max(most, load(shares + i));
    return max_lanes(most);
  }

  Cut find_cut(const Wanted& wanted) {
    float least = std::max(wanted.min_p, std::numeric_limits<float>::min());
    if (wanted.top_k > 0) least = std::max(least, bound_of_top(wanted.top_k));
    const int64_t most_tokens = wanted.top_k > 0 ? wanted.top_k : kAll;
    const Bin all = count_top_bits(bits_of(least));
    Cut cut{bits_of(least), size_, all.sum};
    if (most_tokens < all.count) cut = select(most_tokens, INFINITY, bits_of(least));
    if (wanted.top_p < 1) cut = select(most_tokens, wanted.top_p * cut.sum, bits_of(least));
    return cut;
  }

  // A share that `count` tokens have at least: of the blocks with the greatest maxima.
  float bound_of_top(int64_t count) {
    if (count > static_cast<int64_t>(most_.size())) return 0;
    order_ = most_;
    std::nth_element(order_.begin(), order_.begin() + (count - 1), order_.end(),
                     std::greater<float>());
    return order_[count - 1];
  }

  // f(id, bits) for each share of at least `least`.
  template <typename F>
  void for_shares(int32_t least, const F& f) const {
    for (size_t block = 0; block < most_.size(); block++) {
      if (bits_of(most_[block]) < least) continue;
      const float* shares = shares_.data() + block * kBlock;
      for (int i = 0; i < kBlock; i++) {
        const int32_t bits = bits_of(shares[i]);
        if (bits >= least) f(static_cast<int32_t>(block * kBlock + i), bits);
      }
    }
  }

  static void count(Bin& bin, int32_t bits) {
    bin.count++;
    bin.sum += share_of(bits);
  }

  // Fills top_, by the upper bits; returns the sum.
  Bin count_top_bits(int32_t least) {
    top_.assign(kBins, {0, 0});
    for_shares(least, [&](int32_t, int32_t bits) { count(top_[bits >> (2 * kBits)], bits); });
    Bin all{0, 0};
    for (const Bin& bin : top_) {
      all.count += bin.count;
      all.sum += bin.sum;
    }
    return all;
  }

  // The shortest beginning with one token at least that has so many tokens or such a sum, or
  // everything if it has neither; `top_` is filled.
  Cut select(int64_t most_tokens, double most, int32_t least) {
    Bin above{0, 0};
    const auto is_reached = [&](const Bin& bin) {
      return bin.count && (above.count + bin.count >= most_tokens || above.sum + bin.sum >= most);
    };
    const auto descend = [&](const std::vector<Bin>& bins) {
      int i = kBins - 1;
      for (; i > 0 && !is_reached(bins[i]); i--) {
        above.count += bins[i].count;
        above.sum += bins[i].sum;
      }
      return i;
    };
    int32_t prefix = descend(top_);
    inside_.clear();
    for_shares(std::max(least, prefix << (2 * kBits)), [&](int32_t id, int32_t bits) {
      if (bits >> (2 * kBits) == prefix) inside_.push_back({id, bits});
    });
    for (int shift = kBits; shift >= 0; shift -= kBits) {
      next_.assign(kBins, {0, 0});
      for (const Token& token : inside_)
        if (token.bits >> (shift + kBits) == prefix)
          count(next_[token.bits >> shift & (kBins - 1)], token.bits);
      prefix = prefix << kBits | descend(next_);
    }
    Cut cut{prefix, size_, above.sum};
    for (const Token& token : inside_) {  // equal ones, by id
      if (token.bits != prefix) continue;
      if (cut.last_id != size_ && (above.count >= most_tokens || above.sum >= most)) break;
      count(above, prefix);
      cut.last_id = token.id;
    }
    cut.sum = above.sum;
    return cut;
  }

  struct Token {
    int32_t id, bits;
  };
  int size_ = 0;
  float greatest_ = 0;
  float magic_ = 0;
  std::vector<double> ends_;          // sums up to the end of each block
  std::vector<float> shares_, most_;  // of tokens; the greatest of each block
  std::vector<float> order_;
  std::vector<Bin> top_, next_;
  std::vector<Token> inside_;
};

}  // namespace nanogpt
