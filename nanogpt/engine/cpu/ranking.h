// Which tokens top_k, top_p and min_p keep: a beginning of the ranking by share (equal ones by id,
// lower first), found without sorting. The likeliest few hundred tokens are looked at first. If the
// cut is not among them, a sample of the row says between which two shares it must be, one pass
// over the row sums up what is above, and the tokens in between are looked at. There, rounds of
// ten bits find the cut: shares are not negative, so their bits order them (radix select). Sums
// of shares are exact (see sampling.h), so the way to a cut does not show in it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "row.h"

namespace nanogpt {

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

struct Filters {
  int64_t top_k;  // 0: all
  double top_p;   // 1: all
  float min_p;    // 0: all
  bool any() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

// What is kept: greater shares than that of `bits`, and of those equal to it ids up to `last_id`.
struct Cut {
  int32_t bits;
  int32_t last_id;
};

struct Tally {
  int64_t count = 0;
  double sum = 0;
  void add(float share) {
    count++;
    sum += share;
  }
  Tally operator+(const Tally& other) const { return {count + other.count, sum + other.sum}; }
};

struct Limit {
  int64_t count;
  double sum;
  bool is_reached(const Tally& tally) const {
    return tally.count && (tally.count >= count || tally.sum >= sum);
  }
};

class Ranking {
 public:
  void resize(int num_blocks) {
    shares_.resize(int64_t{num_blocks} * kBlock);
    most_.resize(num_blocks);
    inside_.resize(shares_.size());
  }
  float* block(int i) { return shares_.data() + int64_t{i} * kBlock; }
  const float* block(int i) const { return shares_.data() + int64_t{i} * kBlock; }

  // To be called when a block has been filled.
  void note_greatest(int i) {
    Vec most = load(block(i));
    for (int j = kLanes; j < kBlock; j += kLanes) most = max(most, load(block(i) + j));
    most_[i] = max_lanes(most);
  }

  Cut cut(const Filters& filters) {
    float least = std::max(filters.min_p, std::numeric_limits<float>::min());
    Limit limit{std::numeric_limits<int64_t>::max(), INFINITY};
    if (filters.top_k > 0) {
      limit.count = filters.top_k;
      least = std::max(least, bound_of_top(filters.top_k));
    }
    Tally kept = tally_from(least);
    Cut cut{bits_of(least), static_cast<int32_t>(shares_.size())};
    if (kept.count > limit.count) cut = find(limit, least, kept);
    if (filters.top_p < 1) {
      limit.sum = filters.top_p * kept.sum;
      cut = find(limit, least, kept);
    }
    return cut;
  }

  // A block's shares, with 0 for what isn't kept.
  void keep(int i, const Cut& cut, float* kept) const {
    const float* shares = block(i);
    const float least = share_of(cut.bits);
    const int equal = std::clamp(cut.last_id + 1 - i * kBlock, 0, kBlock);  // are kept below
    for (int j = 0; j < kBlock; j++) kept[j] = shares[j] >= least ? shares[j] : 0.0f;
    for (int j = equal; j < kBlock; j++) kept[j] = shares[j] > least ? shares[j] : 0.0f;
  }

 private:
  static constexpr int kBits = 10, kBins = 1 << kBits;  // a round looks at these
  static constexpr int kShift = 20;     // a sample's bins: this many bits of a share don't count
  static constexpr int kEvery = 16;     // a block of so many is in the sample
  static constexpr double kSlack = 0.03;  // how far off a sample is taken to be

  struct Token {
    int32_t id, bits;
  };
  using Bins = std::vector<Tally>;

  int num_blocks() const { return static_cast<int>(most_.size()); }

  // A share that `count` tokens have at least: of the blocks with the greatest maxima.
  float bound_of_top(int64_t count) {
    return count <= num_blocks() ? nth_greatest(static_cast<int>(count)) : 0;
  }

  // The n-th greatest maximum of a block, from 1.
  float nth_greatest(int n) {
    order_ = most_;
    std::nth_element(order_.begin(), order_.begin() + (n - 1), order_.end(), std::greater<float>());
    return order_[n - 1];
  }

  Tally tally_from(float least) const {
    int64_t count = 0;
    double sum[kLanes] = {};
    for (int b = 0; b < num_blocks(); b++) {
      if (most_[b] < least) continue;
      alignas(64) float shares[kBlock];
      for (int i = 0; i < kBlock; i += kLanes) {
        const Vec x = load(block(b) + i);
        count += __builtin_popcount(lanes_from(x, least));
        store(shares + i, zero_below(x, least, x));
      }
      for (int i = 0; i < kBlock; i += kLanes)
        for (int j = 0; j < kLanes; j++) sum[j] += shares[i + j];
    }
    Tally tally{count, 0};
    for (double each : sum) tally.sum += each;
    return tally;
  }

  // The tokens of shares in [low, high), by id.
  std::span<Token> gather(float low, float high) {
    Token* next = inside_.data();
    for (int b = 0; b < num_blocks(); b++) {
      if (most_[b] < low) continue;
      const float* shares = block(b);
      for (int i = 0; i < kBlock; i += kLanes) {
        const Vec x = load(shares + i);
        for (uint32_t lanes = lanes_from(x, low) & ~lanes_from(x, high); lanes; lanes &= lanes - 1) {
          const int at = i + __builtin_ctz(lanes);
          *next++ = {b * kBlock + at, bits_of(shares[at])};
        }
      }
    }
    return {inside_.data(), next};
  }

  // The highest bin with which the limit is reached, or -1; what is above it joins `above`.
  static int descend(const Bins& bins, const Limit& limit, Tally& above) {
    int i = kBins - 1;
    for (; i >= 0 && !limit.is_reached(above + bins[i]); i--) above = above + bins[i];
    return i;
  }

  // The shortest beginning of the tokens of at least `least`, one at least, that reaches the
  // limit, as all of them do. `kept` is their tally and becomes that of the beginning.
  Cut find(const Limit& limit, float least, Tally& kept) {
    const float likely = std::max(least, nth_greatest((num_blocks() + 1) / 2));
    float low = likely, high = INFINITY;
    Tally above;
    Cut cut;
    while (!find_inside(limit, low, high, above, cut)) {
      if (high == INFINITY && low == likely && likely > least) {  // there are more than the likely
        narrow(limit, least, kept, above, low, high);
        above = tally_from(high);
        if (!limit.is_reached(above)) continue;
        low = high;  // the sample was misleading: it is above
        high = likely;
        above = tally_from(high);
      } else {  // it is below
        high = low;
        low = least;
        above = tally_from(high);
      }
    }
    kept = above;
    return cut;
  }

  // Looks for the cut among the tokens of shares in [low, high); `above` is the tally of higher
  // ones, and becomes that of all that are kept. False leaves what is above `low` in it.
  bool find_inside(const Limit& limit, float low, float high, Tally& above, Cut& cut) {
    std::span<Token> tokens = gather(low, high);
    int32_t first = bits_of(low), count = bits_of(std::min(high, 1.0f)) - first + 1;
    while (true) {
      int shift = 0;
      while (count >> shift > kBins) shift++;
      shift += count >> shift == kBins && count & ((1 << shift) - 1);
      bins_.assign(kBins, {});
      for (const Token& token : tokens)
        bins_[(token.bits - first) >> shift].add(share_of(token.bits));
      const int bin = descend(bins_, limit, above);
      if (bin < 0) return false;
      first += bin << shift;
      count = 1 << shift;
      const auto end = std::remove_if(tokens.begin(), tokens.end(), [&](const Token& token) {
        return token.bits < first || token.bits - first >= count;
      });
      tokens = {tokens.begin(), end};
      if (!shift) break;
    }
    cut.bits = first;
    for (const Token& token : tokens) {  // equal ones, by id
      above.add(share_of(first));
      cut.last_id = token.id;
      if (limit.is_reached(above)) break;
    }
    return true;
  }

  // From what is `above` the share `low`, of all that is `kept`, and from a sample of the rest:
  // between which shares the limit is reached.
  void narrow(const Limit& limit, float least, const Tally& kept, const Tally& above, float& low,
              float& high) {
    const float likely = low;
    bins_.assign(kBins, {});
    Tally sampled;
    for (int b = 0; b < num_blocks(); b += kEvery)
      for (int i = 0; i < kBlock; i++) {
        const float share = block(b)[i];
        if (share < least || share >= likely) continue;
        bins_[bits_of(share) >> kShift].add(share);
        sampled.add(share);
      }
    const double rest[] = {static_cast<double>(kept.count - above.count), kept.sum - above.sum};
    const auto reached_by = [&](double slack) {
      const auto part = [&](double wanted, double rest, double sample) {
        const double more = std::min(slack * wanted, 0.5 * (rest - wanted));
        return (wanted + more) * sample / rest;
      };
      Limit scaled{std::numeric_limits<int64_t>::max(), INFINITY};
      if (limit.count < kept.count)
        scaled.count = static_cast<int64_t>(
            part(static_cast<double>(limit.count - above.count), rest[0],
                 static_cast<double>(sampled.count)));
      if (limit.sum < kept.sum) scaled.sum = part(limit.sum - above.sum, rest[1], sampled.sum);
      Tally none;
      return descend(bins_, scaled, none);
    };
    const int upper = reached_by(-kSlack), lower = reached_by(kSlack);
    high = std::clamp(share_of((upper + 1) << kShift), least, likely);
    low = std::max(least, share_of(std::max(0, lower) << kShift));
  }

  std::vector<float> shares_, most_;  // of tokens; the greatest of each block
  std::vector<float> order_;
  Bins bins_;
  std::vector<Token> inside_;  // room for all of them
};

}  // namespace nanogpt
