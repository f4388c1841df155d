// The operators that Python calls: checks of what comes in, then attention.h.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "attention.h"

namespace nanogpt {
namespace {

void check_indices(const Step& step, int64_t num_blocks, int64_t num_sequences) {
  for (int row = 0; row < step.rows; row++) {
    TORCH_CHECK(step.slots[row] >= 0 && step.slots[row] < num_blocks * step.block_size, "slot ",
                step.slots[row], " of row ", row, " is outside the cache");
    TORCH_CHECK(step.sequence_of[row] >= 0 && step.sequence_of[row] < num_sequences, "row ", row,
                " belongs to no sequence");
    TORCH_CHECK(step.positions[row] >= 0 &&
                    step.positions[row] < int64_t{step.max_blocks} * step.block_size,
                "position ", step.positions[row], " of row ", row, " is past its block table");
  }
  for (int64_t i = 0; i < num_sequences * step.max_blocks; i++)
    TORCH_CHECK(step.tables[i] >= 0 && step.tables[i] < num_blocks, "block ", step.tables[i],
                " does not exist");
}

void check_rows(const at::Tensor& x, const at::Tensor& like, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == like.scalar_type() &&
                  x.sizes() == like.sizes() && x.stride(-1) == 1,
              name, " must be a CPU tensor shaped and typed like q, contiguous in its last dimension");
}

template <typename T>
T* data(const at::Tensor& x) {
  return x.data_ptr<T>();
}

template <typename T>
Rows<T> rows_of(const at::Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1)};
}

template <typename T>
Tiles<T> tiles_of(const at::Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2), static_cast<int>(x.size(2))};
}

// Checks a cache of tiles (height, width) each, that lie one after the other in a head of a block.
void check_cache(const at::Tensor& x, const at::Tensor& q, int64_t height, int64_t width) {
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 5 &&
                  x.size(1) == q.size(1) && x.size(3) == height && x.size(4) == width &&
                  x.stride(2) == height * width && x.stride(3) == width && x.stride(4) == 1,
              "a cache must be (num_blocks, n_head, tiles, ", height, ", ", width,
              ")");
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& key, const at::Tensor& value,
                           const at::Tensor& positions, const at::Tensor& slots,
                           const at::Tensor& block_tables, const at::Tensor& sequence_of) {
  TORCH_CHECK(q.dim() == 3, "q must be (N, n_head, head_size)");
  check_rows(q, q, "q");
  check_rows(k, q, "k");
  check_rows(v, q, "v");
  const int64_t rows = q.size(0), n_head = q.size(1), head_size = q.size(2);
  TORCH_CHECK(head_size <= kMaxHeadSize, "head_size ", head_size, " is over ", kMaxHeadSize);
  const int64_t padded = (head_size + kLanes - 1) / kLanes * kLanes;
  check_cache(key, q, head_size, kLanes);
  check_cache(value, q, kLanes, padded);
  TORCH_CHECK(key.size(0) == value.size(0) && key.size(2) == value.size(2) &&
                  key.scalar_type() == value.scalar_type(),
              "key and value cache must have the same type and blocks");
  TORCH_CHECK(positions.numel() == rows && slots.numel() == rows && sequence_of.numel() == rows &&
                  block_tables.dim() == 2,
              "metadata must describe every row of q");
  TORCH_CHECK(positions.is_contiguous() && slots.is_contiguous() && sequence_of.is_contiguous() &&
                  block_tables.is_contiguous(),
              "metadata must be contiguous");

  const Step step{positions.data_ptr<int64_t>(),
                  slots.data_ptr<int64_t>(),
                  block_tables.data_ptr<int32_t>(),
                  sequence_of.data_ptr<int32_t>(),
                  static_cast<int>(rows),
                  static_cast<int>(block_tables.size(1)),
                  static_cast<int>(key.size(2) * kLanes)};
  check_indices(step, key.size(0), block_tables.size(0));
  at::Tensor out = at::empty({rows, n_head, head_size}, q.options());
  const auto run_as = [&](auto row, auto element) {
    using A = decltype(row);
    using T = decltype(element);
    run(Layer<A, T>{rows_of<A>(q), rows_of<A>(k), rows_of<A>(v), rows_of<A>(out), tiles_of<T>(key),
                    tiles_of<T>(value), static_cast<int>(n_head), static_cast<int>(head_size),
                    static_cast<int>(padded), 1.0f / std::sqrt(static_cast<float>(head_size))},
        step);
  };
  // Rows in float32 or in the type of the cache.
  const auto run_with = [&](auto element) {
    if (q.scalar_type() == at::kFloat) return run_as(float(), element);
    TORCH_CHECK(q.scalar_type() == key.scalar_type(), "q must be float32 or typed like the cache");
    run_as(element, element);
  };
  switch (key.scalar_type()) {
    case at::kFloat: run_with(float()); break;
    case at::kBFloat16: run_with(c10::BFloat16()); break;
    case at::kHalf: run_with(c10::Half()); break;
    default: TORCH_CHECK(false, "no attention over ", key.scalar_type());
  }
  return out;
}

// e^x of a float tensor of non-positive numbers, as the softmax computes it: for its test.
at::Tensor exp_of(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.numel() % kLanes == 0, "x must fill whole registers");
  at::Tensor y = at::empty(x.sizes(), x.options());
  for (int64_t i = 0; i < x.numel(); i += kLanes)
    store(data<float>(y) + i, exp_nonpositive(load(data<float>(x) + i)));
  return y;
}

}  // namespace
}  // namespace nanogpt

TORCH_LIBRARY_FRAGMENT(nanogpt_cpu, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) key, Tensor(b!) value, "
      "Tensor positions, Tensor slots, Tensor block_tables, Tensor sequence_of) -> Tensor");
  m.def("exp_nonpositive(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanogpt_cpu, CPU, m) {
  m.impl("paged_attention", &nanogpt::paged_attention);
  m.impl("exp_nonpositive", &nanogpt::exp_of);
}
