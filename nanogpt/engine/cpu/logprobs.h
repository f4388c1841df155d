// Log probabilities of a row, and its likeliest tokens (see logprobs.py, which has the same in
// torch). They are ranked by log probability as it is rounded to float32, equal ones by id, lower
// first; so the first few are the same however many are asked for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "row.h"

namespace nanogpt {

class Logprobs {
 public:
  // To be called first. For a row that is no distribution, all further answers are NaN.
  template <typename T>
  void read(const T* logits, int size) {
    size_ = size;
    find_greatest(logits);
    if (!is_distribution_) return;
    double total = 0;
    const Vec most = broadcast(greatest_);
    for (int block = 0; block < blocks_of(size); block++) {
      Vec sum = broadcast(0.0f);
      for_vectors(logits, size, block * kBlock, (block + 1) * kBlock,
                  [&](int, Vec x) { sum = add(sum, exp_nonpositive(sub(x, most))); });
      total += sum_lanes(sum);
    }
    log_sum_ = static_cast<float>(std::log(total));
  }

  template <typename T>
  float of(const T* logits, int64_t token) const {
    if (!is_distribution_ || token < 0 || token >= size_)
      return std::numeric_limits<float>::quiet_NaN();
    return logprob(static_cast<float>(logits[token]));
  }

  // The `count` likeliest, count <= size.
  template <typename T>
  void likeliest(const T* logits, int count, int64_t* ids, float* values) {
    if (!is_distribution_) {
      for (int i = 0; i < count; i++) {
        ids[i] = i;
        values[i] = std::numeric_limits<float>::quiet_NaN();
      }
      return;
    }
    gather(logits, least_of_likeliest(count));
    std::partial_sort(found_.begin(), found_.begin() + count, found_.end(),
                      [](const Token& a, const Token& b) {
                        return a.logprob != b.logprob ? a.logprob > b.logprob : a.id < b.id;
                      });
    for (int i = 0; i < count; i++) {
      ids[i] = found_[i].id;
      values[i] = found_[i].logprob;
    }
  }

 private:
  struct Token {
    float logprob;
    int32_t id;
  };

  float logprob(float x) const { return (x - greatest_) - log_sum_; }
  Vec logprob(Vec x) const { return sub(sub(x, broadcast(greatest_)), broadcast(log_sum_)); }

  template <typename T>
  void find_greatest(const T* logits) {
    most_.resize(blocks_of(size_));
    Vec bad = broadcast(0.0f);
    for (int block = 0; block < blocks_of(size_); block++) {
      Vec most = broadcast(-INFINITY);
      for_vectors(logits, size_, block * kBlock, (block + 1) * kBlock, [&](int, Vec x) {
        most = max(most, x);
        bad = max(bad, not_a_logit(x));
      });
      most_[block] = max_lanes(most);
    }
    greatest_ = *std::max_element(most_.begin(), most_.end());
    is_distribution_ = max_lanes(bad) == 0 && greatest_ > -INFINITY;
  }

  // A log probability that `count` tokens have at least: each of so many blocks has one.
  float least_of_likeliest(int count) {
    if (count > static_cast<int>(most_.size())) return -INFINITY;
    order_ = most_;
    const auto nth = order_.begin() + std::max(0, count - 1);
    std::nth_element(order_.begin(), nth, order_.end(), std::greater<float>());
    return logprob(*nth);
  }

  // All tokens of at least that log probability, by id.
  template <typename T>
  void gather(const T* logits, float least) {
    found_.clear();
    for (int block = 0; block < blocks_of(size_); block++) {
      if (logprob(most_[block]) < least) continue;
      for_vectors(logits, size_, block * kBlock, (block + 1) * kBlock, [&](int first, Vec x) {
        alignas(64) float lane[kLanes];
        uint32_t lanes = lanes_from(logprob(x), least);
        if (!lanes) return;
        store(lane, logprob(x));
        for (; lanes; lanes &= lanes - 1) {
          const int i = __builtin_ctz(lanes);
          if (first + i < size_) found_.push_back({lane[i], first + i});
        }
      });
    }
  }

  int size_ = 0;
  bool is_distribution_ = false;
  float greatest_ = 0, log_sum_ = 0;
  std::vector<float> most_, order_;  // the greatest logit of each block
  std::vector<Token> found_;
};

}  // namespace nanogpt
