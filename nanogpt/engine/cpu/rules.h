// What requests change about their logits before a token is drawn: logit_rules.py says what, and
// does the same in torch, to the bit. A row is changed in place and then put back as it was, so
// that its log probabilities stay those of the model.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace nanogpt {

// Tokens of all rows behind one another; `ends[row]` is where those of a row end.
struct Tokens {
  const int64_t* ends;
  const int64_t* ids;

  // f(number, id) for each of a row.
  template <typename F>
  void for_row(int64_t row, const F& f) const {
    for (int64_t i = row ? ends[row - 1] : 0; i < ends[row]; i++) f(i, ids[i]);
  }
};

struct Penalties {
  float repetition, frequency, presence;
};

struct Rules {
  Tokens seen;
  const float* counts;         // how often each was generated; those of the prompt count 0 times
  const Penalties* penalties;  // (rows,)
  Tokens biased;
  const float* bias;
  Tokens ends;             // are banned ...
  const int64_t* minimum;  // ... before so many tokens (rows,)
};

class RowRules {
 public:
  // For row `row` of which `position` tokens have been generated. Ids from `size` on are padding,
  // which is never sampled.
  void apply(const Rules& rules, int64_t row, int64_t position, float* logits, int size) {
    changed_.clear();
    const auto change = [&](int64_t id, const auto& f) {
      if (id < 0 || id >= size) return;
      changed_.emplace_back(id, logits[id]);
      logits[id] = f(logits[id]);
    };
    const Penalties p = rules.penalties[row];
    rules.seen.for_row(row, [&](int64_t i, int64_t id) {
      change(id, [&](float x) {
        x = x > 0 ? x / p.repetition : x * p.repetition;
        const float count = rules.counts[i];
        return x - count * p.frequency - (count > 0 ? p.presence : 0.0f);
      });
    });
    rules.biased.for_row(row, [&](int64_t i, int64_t id) {
      change(id, [&](float x) { return x + rules.bias[i]; });
    });
    if (position >= rules.minimum[row]) return;
    rules.ends.for_row(row, [&](int64_t, int64_t id) {
      change(id, [](float) { return -INFINITY; });
    });
  }

  void undo(float* logits) {
    for (auto each = changed_.rbegin(); each != changed_.rend(); ++each)
      logits[each->first] = each->second;
  }

 private:
  std::vector<std::pair<int64_t, float>> changed_;  // ids, and what they were before
};

}  // namespace nanogpt
