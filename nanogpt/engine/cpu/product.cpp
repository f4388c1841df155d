// The operators of linear layers that Python calls: checks of what comes in, then product.h.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "product.h"

namespace nanogpt {
namespace {

// Calls f(W()) with the type of the weights.
template <typename F>
void for_type(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat: return f(float());
    case at::kBFloat16: return f(c10::BFloat16());
    case at::kHalf: return f(c10::Half());
    default: TORCH_CHECK(false, "no products for ", type);
  }
}

// Splits `panels` into equal, adjacent parts: each thread reads one stream of memory.
template <typename F>
void for_panels(int64_t panels, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), panels);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    f(panels * first / threads, panels * last / threads);
  });
}

at::Tensor pack_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "a weight must be (outputs, inputs)");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  at::Tensor packed;
  for_type(weight.scalar_type(), [&](auto element) {
    using W = decltype(element);
    constexpr int64_t G = kGroup<W>;
    const int64_t groups = (inputs + G - 1) / G;
    packed = at::empty({panels, groups, kPanel, G}, weight.options());
    const W* from = weight.data_ptr<W>();
    W* to = packed.data_ptr<W>();
    for_panels(panels, [&](int64_t begin, int64_t end) {
      pack(from, outputs, inputs, begin, end, to);
    });
  });
  return packed;
}

const float* vector_of(const std::optional<at::Tensor>& t, at::IntArrayRef sizes) {
  if (!t) return nullptr;
  TORCH_CHECK(t->sizes() == sizes && t->scalar_type() == at::kFloat && t->is_contiguous(),
              "bias and residual must be contiguous float32, shaped ", sizes);
  return t->data_ptr<float>();
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& packed,
                  const std::optional<at::Tensor>& bias, int64_t outputs, int64_t gelu,
                  const std::optional<at::Tensor>& residual) {
  TORCH_CHECK(packed.dim() == 4 && packed.size(2) == kPanel && packed.is_contiguous(),
              "packed weights must be (panels, groups, ", kPanel, ", group)");
  const int64_t group = packed.size(3), inputs = packed.size(1) * group, panels = packed.size(0);
  TORCH_CHECK((panels - 1) * kPanel < outputs && outputs <= panels * kPanel, outputs,
              " outputs don't fill ", panels, " panels");
  TORCH_CHECK(input.dim() == 2 && input.scalar_type() == at::kFloat &&
                  inputs - group < input.size(1) && input.size(1) <= inputs,
              "x must be (rows, ", inputs, ") in float32");
  at::Tensor x = input.stride(1) == 1 ? input : input.contiguous();
  if (x.size(1) < inputs) x = at::constant_pad_nd(x, {0, inputs - x.size(1)});
  at::Tensor y = at::empty({x.size(0), outputs}, x.options());
  const Epilogue epilogue{vector_of(bias, {outputs}), static_cast<Gelu>(gelu),
                          vector_of(residual, y.sizes()), y.data_ptr<float>(), outputs};
  for_type(packed.scalar_type(), [&](auto element) {
    using W = decltype(element);
    TORCH_CHECK(group == kGroup<W>, "weights of ", packed.scalar_type(), " in groups of ", group);
    const Input in{x.data_ptr<float>(), x.stride(0), x.size(0), inputs};
    for_panels(panels, [&](int64_t begin, int64_t end) {
      product(in, packed.data_ptr<W>(), begin, end, epilogue);
    });
  });
  return y;
}

// GELU alone, for its test.
at::Tensor gelu_of(const at::Tensor& x, int64_t kind) {
  TORCH_CHECK(x.is_contiguous() && x.numel() % kLanes == 0, "x must fill whole registers");
  at::Tensor y = at::empty(x.sizes(), x.options());
  for (int64_t i = 0; i < x.numel(); i += kLanes)
    store(y.data_ptr<float>() + i, gelu(load(x.data_ptr<float>() + i), static_cast<Gelu>(kind)));
  return y;
}

}  // namespace
}  // namespace nanogpt

TORCH_LIBRARY_FRAGMENT(nanogpt_cpu, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int outputs, int gelu, Tensor? residual) -> "
      "Tensor");
  m.def("gelu(Tensor x, int kind) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanogpt_cpu, CPU, m) {
  m.impl("pack_weight", &nanogpt::pack_weight);
  m.impl("linear", &nanogpt::linear);
  m.impl("gelu", &nanogpt::gelu_of);
}
