// Attention as an operator that Python calls: checks of what comes in, then attention.h.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "paged.h"

namespace nanogpt {
namespace {

void check_rows(const at::Tensor& x, const at::Tensor& like, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == like.scalar_type() &&
                  x.sizes() == like.sizes() && x.stride(-1) == 1,
              name, " must be a CPU tensor shaped and typed like q, contiguous in its last dim");
}

template <typename T>
Rows<T> rows_of(const at::Tensor& x) {
  return {x.data_ptr<T>(), x.stride(0), x.stride(1)};
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
  check_cache(key, value, n_head, head_size);
  const Step step = step_of(positions, slots, block_tables, sequence_of, rows, key.size(0),
                            key.size(2) * kLanes);
  at::Tensor out = at::empty({rows, n_head, head_size}, q.options());
  const auto run_as = [&](auto row, auto element) {
    using A = decltype(row);
    using T = decltype(element);
    run(layer_of<A, T>(rows_of<A>(q), rows_of<A>(k), rows_of<A>(v), rows_of<A>(out), key, value,
                       n_head, head_size),
        step, Plan(step, n_head));
  };
  for_cache_type(key.scalar_type(), [&](auto element) {
    if (q.scalar_type() == at::kFloat) return run_as(float(), element);
    TORCH_CHECK(q.scalar_type() == key.scalar_type(), "q must be float32 or typed like the cache");
    run_as(element, element);
  });
  return out;
}

// e^x of a float tensor of non-positive numbers, as the softmax computes it: for its test.
at::Tensor exp_of(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.numel() % kLanes == 0, "x must fill whole registers");
  at::Tensor y = at::empty(x.sizes(), x.options());
  for (int64_t i = 0; i < x.numel(); i += kLanes)
    store(y.data_ptr<float>() + i, exp_nonpositive(load(x.const_data_ptr<float>() + i)));
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
