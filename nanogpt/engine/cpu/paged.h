// From the tensors of a step and of a cache, checked, to the structures of attention.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "attention.h"

namespace nanogpt {

// Metadata of `rows` rows, over a cache of `num_blocks` blocks of `block_size` keys.
inline Step step_of(const at::Tensor& positions, const at::Tensor& slots,
                    const at::Tensor& block_tables, const at::Tensor& sequence_of, int64_t rows,
                    int64_t num_blocks, int64_t block_size) {
  TORCH_CHECK(positions.numel() == rows && slots.numel() == rows && sequence_of.numel() == rows &&
                  block_tables.dim() == 2,
              "metadata must describe every row of q");
  TORCH_CHECK(positions.is_contiguous() && slots.is_contiguous() && sequence_of.is_contiguous() &&
                  block_tables.is_contiguous(),
              "metadata must be contiguous");
  const Step step{positions.const_data_ptr<int64_t>(),
                  slots.const_data_ptr<int64_t>(),
                  block_tables.const_data_ptr<int32_t>(),
                  sequence_of.const_data_ptr<int32_t>(),
                  static_cast<int>(rows),
                  static_cast<int>(block_tables.size(1)),
                  static_cast<int>(block_size)};
  const int64_t num_sequences = block_tables.size(0);
  for (int row = 0; row < step.rows; row++) {
    TORCH_CHECK(step.slots[row] >= 0 && step.slots[row] < num_blocks * block_size, "slot ",
                step.slots[row], " of row ", row, " is outside the cache");
    TORCH_CHECK(step.sequence_of[row] >= 0 && step.sequence_of[row] < num_sequences, "row ", row,
                " belongs to no sequence");
    TORCH_CHECK(step.positions[row] >= 0 && step.positions[row] < step.max_blocks * block_size,
                "position ", step.positions[row], " of row ", row, " is past its block table");
  }
  for (int64_t i = 0; i < num_sequences * step.max_blocks; i++)
    TORCH_CHECK(step.tables[i] >= 0 && step.tables[i] < num_blocks, "block ", step.tables[i],
                " does not exist");
  return step;
}

inline int64_t padded_size(int64_t head_size) { return (head_size + kLanes - 1) / kLanes * kLanes; }

// Checks the key and value cache of one layer: tiles that lie one after the other in a head of a
// block, (head_size, 16) of keys and (16, padded) of values.
inline void check_cache(const at::Tensor& key, const at::Tensor& value, int64_t n_head,
                        int64_t head_size) {
  TORCH_CHECK(0 < head_size && head_size <= kMaxHeadSize, "head_size ", head_size, " is over ",
              kMaxHeadSize);
  const auto fits = [&](const at::Tensor& x, int64_t height, int64_t width) {
    return x.device().is_cpu() && x.dim() == 5 && x.size(1) == n_head && x.size(3) == height &&
           x.size(4) == width && x.stride(2) == height * width && x.stride(3) == width &&
           x.stride(4) == 1;
  };
  const int64_t padded = padded_size(head_size);
  TORCH_CHECK(fits(key, head_size, kLanes), "a key cache must be (num_blocks, n_head, tiles, ",
              head_size, ", ", kLanes, ")");
  TORCH_CHECK(fits(value, kLanes, padded), "a value cache must be (num_blocks, n_head, tiles, ",
              kLanes, ", ", padded, ")");
  TORCH_CHECK(key.size(0) == value.size(0) && key.size(2) == value.size(2) &&
                  key.scalar_type() == value.scalar_type(),
              "key and value cache must have the same type and blocks");
}

template <typename T>
Tiles<T> tiles_of(const at::Tensor& x) {
  return {x.data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2), static_cast<int>(x.size(2))};
}

// One layer's attention: rows of A over a cache of T, which check_cache has seen.
template <typename A, typename T>
Layer<A, T> layer_of(Rows<A> q, Rows<A> k, Rows<A> v, Rows<A> out, const at::Tensor& key,
                     const at::Tensor& value, int64_t n_head, int64_t head_size) {
  return {q,
          k,
          v,
          out,
          tiles_of<T>(key),
          tiles_of<T>(value),
          static_cast<int>(n_head),
          static_cast<int>(head_size),
          static_cast<int>(padded_size(head_size)),
          1.0f / std::sqrt(static_cast<float>(head_size))};
}

// Calls f(T()) with the type of a cache.
template <typename F>
void for_cache_type(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat: return f(float());
    case at::kBFloat16: return f(c10::BFloat16());
    case at::kHalf: return f(c10::Half());
    default: TORCH_CHECK(false, "no attention over ", type);
  }
}

}  // namespace nanogpt
