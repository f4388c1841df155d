// A linear layer with packed weights of any type, as a tensor holds them; and its products with
// all threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "int8.h"

namespace nanogpt {

// Calls f(W()) with the type of the weights.
template <typename F>
void for_type(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat: return f(float());
    case at::kBFloat16: return f(c10::BFloat16());
    case at::kHalf: return f(c10::Half());
    case at::kChar: return f(int8_t());
    default: TORCH_CHECK(false, "no products for ", type);
  }
}

// Splits 0..count-1 into equal, adjacent parts, one for each thread: f(begin, end).
template <typename F>
void for_parts(int64_t count, int64_t threads, const F& f) {
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    f(count * first / threads, count * last / threads);
  });
}

// Threads worth waking for this many elements that are read or written once.
inline int64_t threads_for(int64_t elements) {
  constexpr int64_t kLeast = 16384;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), elements / kLeast));
}

// The weights (panels, bytes or groups, ...) of `inputs` inputs and `outputs` outputs.
struct Packed {
  at::Tensor tensor;
  int64_t inputs, outputs, panels;
  const float* bias;  // (outputs,), or null

  Packed(const at::Tensor& packed, const at::Tensor& bias_or_empty, int64_t inputs,
         int64_t outputs)
      : tensor(packed),
        inputs(inputs),
        outputs(outputs),
        panels((outputs + kPanel - 1) / kPanel),
        bias(bias_or_empty.numel() ? bias_or_empty.const_data_ptr<float>() : nullptr) {
    int64_t size = 0;
    for_type(packed.scalar_type(), [&](auto element) {
      using W = decltype(element);
      size = panel_size<W>(padded<W>());
    });
    TORCH_CHECK(packed.is_contiguous() && packed.numel() == panels * size, "a packed weight of ",
                packed.sizes(), " is not of ", inputs, " inputs and ", outputs, " outputs");
    TORCH_CHECK(!bias || (bias_or_empty.numel() == outputs && bias_or_empty.is_contiguous()),
                "a bias must be contiguous float32, (", outputs, ",)");
  }

  template <typename W>
  int64_t padded() const {
    return (inputs + kGroup<W> - 1) / kGroup<W> * kGroup<W>;
  }
};

// y = gelu(x W^T + b) + residual, where residual may be null, and may be y.
void multiply(const float* x, int64_t stride, int64_t rows, const Packed& weight, Gelu gelu,
              const float* residual, float* y);

}  // namespace nanogpt
